"""Tables of indexers: the protocol, and what its implementations share."""
