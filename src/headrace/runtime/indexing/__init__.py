"""Indexing: ordered events, handlers over a staged entity store, and the overlapped commit."""
