"""The engine on the network: batches streamed in, runs looked at, workers far away. Needs `headrace[server]`."""
