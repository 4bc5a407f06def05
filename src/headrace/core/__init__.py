"""Pure decisions: no I/O, no clock, no event loop. Modules here import only errors, ids and limits of foundation."""
