"""Loops and tasks: everything that waits, retries or runs user code."""
