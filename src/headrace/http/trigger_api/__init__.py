"""The API that trigger.dev's clients speak (`/api/v?/…`): batches, runs, uploads."""
