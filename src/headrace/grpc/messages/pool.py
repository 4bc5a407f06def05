"""Where the descriptors of the generated messages live: a pool of their own.

The default pool is one for the whole process and takes each name once, so that a program which uses another package
of the same messages (a client of the broker, the health service of grpcio) could not import Headrace.
"""

from __future__ import annotations

from typing import Any, Final

from google.protobuf import descriptor_pool, message_factory, timestamp_pb2
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper

POOL: Final = descriptor_pool.DescriptorPool()
POOL.AddSerializedFile(timestamp_pb2.DESCRIPTOR.serialized_pb)


def built(names: dict[str, Any], serialized: bytes) -> None:
    """Fill a module with the messages and enums of a file."""
    file = POOL.AddSerializedFile(serialized)
    names["DESCRIPTOR"] = file
    for name, message in file.message_types_by_name.items():
        names[name] = message_factory.GetMessageClass(message)
    for name, enum in file.enum_types_by_name.items():
        names[name] = EnumTypeWrapper(enum)
        names.update((value.name, value.number) for value in enum.values)
