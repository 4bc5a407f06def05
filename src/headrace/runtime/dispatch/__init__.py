"""Dispatch: deliver leased activations to remote workers and record their reports."""
