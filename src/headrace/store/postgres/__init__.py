"""A store on PostgreSQL: many machines, and the engine that users already run, replicate and back up."""

from headrace.store.postgres.copy_target import PostgresCopyTarget
from headrace.store.postgres.notifier import PostgresNotifier
from headrace.store.postgres.store import PostgresStore

__all__ = ["PostgresCopyTarget", "PostgresNotifier", "PostgresStore"]
