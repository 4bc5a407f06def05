"""A store on PostgreSQL: for many machines, on a server that is replicated and backed up already."""

from headrace.store.postgres.copy_target import PostgresCopyTarget
from headrace.store.postgres.notifier import PostgresNotifier
from headrace.store.postgres.store import PostgresStore

__all__ = ["PostgresCopyTarget", "PostgresNotifier", "PostgresStore"]
