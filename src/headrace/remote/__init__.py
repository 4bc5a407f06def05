"""Client side of the HTTP API: a store kept by a server, and a client to send batches. Requires `headrace[client]`."""
