"""HTTP server: trigger.dev's API, the `/v1` API, and gRPC on the same port. Needs `headrace[server]`."""
