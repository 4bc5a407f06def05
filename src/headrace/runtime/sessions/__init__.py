"""Sessions: the process's entry in the store, its leases, its in-flight marks, and recovery."""
