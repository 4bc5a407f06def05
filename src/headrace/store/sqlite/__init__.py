"""A store in one SQLite file: no set-up, one machine, every commit on disk before it is answered."""

from headrace.store.sqlite.commit_watcher import Watcher
from headrace.store.sqlite.copy_source import SqliteDeparture
from headrace.store.sqlite.store import SqliteStore

__all__ = ["SqliteDeparture", "SqliteStore", "Watcher"]
