"""Maintenance: upkeep, the scheduler, and copying one store into another."""
