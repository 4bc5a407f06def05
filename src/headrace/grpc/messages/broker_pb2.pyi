# Generated from protos/headrace/v1/broker.proto by `python -m tests.grpc.test_protos`; not to be edited.

from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    KIND_JSON: _ClassVar[Kind]
    KIND_SUPER_JSON: _ClassVar[Kind]
    KIND_TEXT: _ClassVar[Kind]
    KIND_MSGPACK: _ClassVar[Kind]

class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STATE_COMPLETED: _ClassVar[State]
    STATE_FAILED: _ClassVar[State]
    STATE_CANCELLED: _ClassVar[State]
    STATE_RETRY: _ClassVar[State]

class Word(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORD_SETTLED: _ClassVar[Word]
    WORD_RECORDED: _ClassVar[Word]
    WORD_LOST: _ClassVar[Word]
KIND_JSON: Kind
KIND_SUPER_JSON: Kind
KIND_TEXT: Kind
KIND_MSGPACK: Kind
STATE_COMPLETED: State
STATE_FAILED: State
STATE_CANCELLED: State
STATE_RETRY: State
WORD_SETTLED: Word
WORD_RECORDED: Word
WORD_LOST: Word

class StartSessionRequest(_message.Message):
    __slots__ = ("host", "pid")
    HOST_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    host: str
    pid: int
    def __init__(self, host: _Optional[str] = ..., pid: _Optional[int] = ...) -> None: ...

class StartSessionResponse(_message.Message):
    __slots__ = ("session", "heartbeat_ms", "session_timeout_ms")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_MS_FIELD_NUMBER: _ClassVar[int]
    SESSION_TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    session: str
    heartbeat_ms: int
    session_timeout_ms: int
    def __init__(self, session: _Optional[str] = ..., heartbeat_ms: _Optional[int] = ..., session_timeout_ms: _Optional[int] = ...) -> None: ...

class HeartbeatRequest(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: str
    def __init__(self, session: _Optional[str] = ...) -> None: ...

class HeartbeatResponse(_message.Message):
    __slots__ = ("leases", "claim_nos", "stopped", "cancelled")
    LEASES_FIELD_NUMBER: _ClassVar[int]
    CLAIM_NOS_FIELD_NUMBER: _ClassVar[int]
    STOPPED_FIELD_NUMBER: _ClassVar[int]
    CANCELLED_FIELD_NUMBER: _ClassVar[int]
    leases: _containers.RepeatedScalarFieldContainer[str]
    claim_nos: _containers.RepeatedScalarFieldContainer[int]
    stopped: _containers.RepeatedScalarFieldContainer[str]
    cancelled: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, leases: _Optional[_Iterable[str]] = ..., claim_nos: _Optional[_Iterable[int]] = ..., stopped: _Optional[_Iterable[str]] = ..., cancelled: _Optional[_Iterable[str]] = ...) -> None: ...

class EndSessionRequest(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: str
    def __init__(self, session: _Optional[str] = ...) -> None: ...

class EndSessionResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ClaimManyRequest(_message.Message):
    __slots__ = ("session", "claim_no", "tasks", "queues", "runs_max", "wait_ms")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    CLAIM_NO_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    QUEUES_FIELD_NUMBER: _ClassVar[int]
    RUNS_MAX_FIELD_NUMBER: _ClassVar[int]
    WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    session: str
    claim_no: int
    tasks: _containers.RepeatedScalarFieldContainer[str]
    queues: _containers.RepeatedScalarFieldContainer[str]
    runs_max: int
    wait_ms: int
    def __init__(self, session: _Optional[str] = ..., claim_no: _Optional[int] = ..., tasks: _Optional[_Iterable[str]] = ..., queues: _Optional[_Iterable[str]] = ..., runs_max: _Optional[int] = ..., wait_ms: _Optional[int] = ...) -> None: ...

class Headers(_message.Message):
    __slots__ = ("values",)
    class ValuesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.ScalarMap[str, str]
    def __init__(self, values: _Optional[_Mapping[str, str]] = ...) -> None: ...

class Lease(_message.Message):
    __slots__ = ("lease", "batch_id", "task", "queue", "attempt", "at_most_once", "expires_us", "places", "indexes", "payloads", "kinds", "headers")
    class HeadersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: Headers
        def __init__(self, key: _Optional[int] = ..., value: _Optional[_Union[Headers, _Mapping]] = ...) -> None: ...
    LEASE_FIELD_NUMBER: _ClassVar[int]
    BATCH_ID_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    QUEUE_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    AT_MOST_ONCE_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_US_FIELD_NUMBER: _ClassVar[int]
    PLACES_FIELD_NUMBER: _ClassVar[int]
    INDEXES_FIELD_NUMBER: _ClassVar[int]
    PAYLOADS_FIELD_NUMBER: _ClassVar[int]
    KINDS_FIELD_NUMBER: _ClassVar[int]
    HEADERS_FIELD_NUMBER: _ClassVar[int]
    lease: str
    batch_id: str
    task: str
    queue: str
    attempt: int
    at_most_once: bool
    expires_us: int
    places: _containers.RepeatedScalarFieldContainer[int]
    indexes: _containers.RepeatedScalarFieldContainer[int]
    payloads: _containers.RepeatedScalarFieldContainer[bytes]
    kinds: _containers.RepeatedScalarFieldContainer[Kind]
    headers: _containers.MessageMap[int, Headers]
    def __init__(self, lease: _Optional[str] = ..., batch_id: _Optional[str] = ..., task: _Optional[str] = ..., queue: _Optional[str] = ..., attempt: _Optional[int] = ..., at_most_once: _Optional[bool] = ..., expires_us: _Optional[int] = ..., places: _Optional[_Iterable[int]] = ..., indexes: _Optional[_Iterable[int]] = ..., payloads: _Optional[_Iterable[bytes]] = ..., kinds: _Optional[_Iterable[_Union[Kind, str]]] = ..., headers: _Optional[_Mapping[int, Headers]] = ...) -> None: ...

class ClaimManyResponse(_message.Message):
    __slots__ = ("leases",)
    LEASES_FIELD_NUMBER: _ClassVar[int]
    leases: _containers.RepeatedCompositeFieldContainer[Lease]
    def __init__(self, leases: _Optional[_Iterable[_Union[Lease, _Mapping]]] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("type", "message", "trace")
    TYPE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    TRACE_FIELD_NUMBER: _ClassVar[int]
    type: str
    message: str
    trace: str
    def __init__(self, type: _Optional[str] = ..., message: _Optional[str] = ..., trace: _Optional[str] = ...) -> None: ...

class Settlement(_message.Message):
    __slots__ = ("lease", "part_no", "places", "states", "outputs", "failures", "retry_after_ms")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    PART_NO_FIELD_NUMBER: _ClassVar[int]
    PLACES_FIELD_NUMBER: _ClassVar[int]
    STATES_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    lease: str
    part_no: int
    places: _containers.RepeatedScalarFieldContainer[int]
    states: _containers.RepeatedScalarFieldContainer[State]
    outputs: _containers.RepeatedScalarFieldContainer[bytes]
    failures: _containers.RepeatedCompositeFieldContainer[Failure]
    retry_after_ms: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, lease: _Optional[str] = ..., part_no: _Optional[int] = ..., places: _Optional[_Iterable[int]] = ..., states: _Optional[_Iterable[_Union[State, str]]] = ..., outputs: _Optional[_Iterable[bytes]] = ..., failures: _Optional[_Iterable[_Union[Failure, _Mapping]]] = ..., retry_after_ms: _Optional[_Iterable[int]] = ...) -> None: ...

class SettleManyRequest(_message.Message):
    __slots__ = ("settlements",)
    SETTLEMENTS_FIELD_NUMBER: _ClassVar[int]
    settlements: _containers.RepeatedCompositeFieldContainer[Settlement]
    def __init__(self, settlements: _Optional[_Iterable[_Union[Settlement, _Mapping]]] = ...) -> None: ...

class SettleManyResponse(_message.Message):
    __slots__ = ("words",)
    WORDS_FIELD_NUMBER: _ClassVar[int]
    words: _containers.RepeatedScalarFieldContainer[Word]
    def __init__(self, words: _Optional[_Iterable[_Union[Word, str]]] = ...) -> None: ...

class ReleaseManyRequest(_message.Message):
    __slots__ = ("leases",)
    LEASES_FIELD_NUMBER: _ClassVar[int]
    leases: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, leases: _Optional[_Iterable[str]] = ...) -> None: ...

class ReleaseManyResponse(_message.Message):
    __slots__ = ("words",)
    WORDS_FIELD_NUMBER: _ClassVar[int]
    words: _containers.RepeatedScalarFieldContainer[Word]
    def __init__(self, words: _Optional[_Iterable[_Union[Word, str]]] = ...) -> None: ...
