"""Pure decisions: no I/O, no clock, no loop. A room here imports errors and limits only."""
