"""Headrace's own API (`/v1/…`): batches, activations, worker sessions, and the store for remote processes."""
