"""A store in the memory of one process: the specification that the stores on databases are compared with."""

from headrace.store.memory.entities import MemoryEntities
from headrace.store.memory.store import MemoryStore

__all__ = ["MemoryEntities", "MemoryStore"]
