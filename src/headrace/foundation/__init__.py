"""Errors, ids, limits and settings, which every other package uses."""
