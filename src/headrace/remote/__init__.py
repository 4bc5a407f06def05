"""The other end of the network: a store that a server keeps, and a client. Needs `headrace[client]`."""
