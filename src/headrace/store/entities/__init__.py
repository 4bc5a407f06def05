"""Where an indexer's rows live: the seam, and what its houses share."""
