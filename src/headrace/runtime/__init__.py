"""Where loops and tasks live: everything that waits, retries or runs user code."""
