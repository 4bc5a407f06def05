"""Descriptor pool of the generated messages.

The default pool is shared by the whole process and accepts each name once. A program that also uses another package of
the same messages (a client of the broker, grpcio's health service) could not import Headrace if it used that pool.
"""

from __future__ import annotations

from typing import Any, Final

from google.protobuf import descriptor_pool, message_factory, timestamp_pb2
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper

POOL: Final = descriptor_pool.DescriptorPool()
POOL.AddSerializedFile(timestamp_pb2.DESCRIPTOR.serialized_pb)


def built(names: dict[str, Any], serialized: bytes) -> None:
    """Add the messages and enums of a file to a module."""
    file = POOL.AddSerializedFile(serialized)
    names["DESCRIPTOR"] = file
    for name, message in file.message_types_by_name.items():
        names[name] = message_factory.GetMessageClass(message)
    for name, enum in file.enum_types_by_name.items():
        names[name] = EnumTypeWrapper(enum)
        names.update((value.name, value.number) for value in enum.values)
