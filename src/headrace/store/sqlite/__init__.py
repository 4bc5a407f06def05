"""A store in one SQLite file: no set-up, one machine, every commit on disk before it is answered."""

from headrace.store.sqlite.departing import SqliteDeparture
from headrace.store.sqlite.store import SqliteStore
from headrace.store.sqlite.watcher import Watcher

__all__ = ["SqliteDeparture", "SqliteStore", "Watcher"]
