"""Producing: from calls, iterables and NDJSON streams to durable runs."""
