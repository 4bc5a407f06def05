"""The seam between deciding and keeping: the `Store` protocol and the houses that implement it."""
