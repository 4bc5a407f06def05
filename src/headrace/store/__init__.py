"""Storage of batches: the protocols of a store, and stores in memory, on SQLite and on PostgreSQL."""
