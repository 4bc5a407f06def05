"""Tests of every command, run as a user runs it."""
