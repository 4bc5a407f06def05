"""Worker: claims leases, executes their runs, and supervises processes."""
