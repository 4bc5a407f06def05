"""A store in one SQLite file: no setup, one machine, every commit on disk before it is acknowledged."""

from headrace.store.sqlite.commit_watcher import CommitWatcher
from headrace.store.sqlite.copy_source import SqliteCopySource
from headrace.store.sqlite.store import SqliteStore

__all__ = ["CommitWatcher", "SqliteCopySource", "SqliteStore"]
