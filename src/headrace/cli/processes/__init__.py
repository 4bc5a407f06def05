"""Commands that run until they are stopped or their work is done."""
