"""Commands that list and change batches, runs, queues and rules."""
