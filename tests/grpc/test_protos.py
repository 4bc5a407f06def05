"""Generated messages match their `.proto` files.

`python -m tests.grpc.test_protos` regenerates them.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest
from google.protobuf import descriptor_pb2

ROOT: Final = Path(__file__).parents[2]
PROTOS: Final = ROOT / "src" / "headrace" / "grpc" / "protos"
MESSAGES: Final = ROOT / "src" / "headrace" / "grpc" / "messages"
SOURCES: Final = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.rglob("*.proto"))
LINE: Final = 24
HEAD: Final = '''\
"""Generated from `protos/{source}` by `python -m tests.grpc.test_protos`; not to be edited."""

from headrace.grpc.messages.pool import built

built(
    globals(),
'''


def generated(into: Path) -> dict[str, str]:
    """Generate all files. Returns their texts by name."""
    descriptors = into / "descriptors"
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTOS}", f"--descriptor_set_out={descriptors}"]
    subprocess.run([*command, f"--pyi_out={into}", *SOURCES], check=True, timeout=60)
    files = descriptor_pb2.FileDescriptorSet.FromString(descriptors.read_bytes()).file
    written = {}
    for file in files:
        name = f"{Path(file.name).stem}_pb2"
        packed = file.SerializeToString(deterministic=True)
        lines = [packed[start : start + LINE] for start in range(0, len(packed), LINE)]
        written[f"{name}.py"] = HEAD.format(source=file.name) + "".join(f"    {line!r}\n" for line in lines) + ")\n"
        hints = (into / Path(file.name).with_name(f"{name}.pyi")).read_text(encoding="utf-8")
        written[f"{name}.pyi"] = (
            f"# Generated from protos/{file.name} by `python -m tests.grpc.test_protos`; not to be edited.\n\n{hints}"
        )
    return written


def words(text: str) -> set[str]:
    """All identifiers in a text. Generator versions differ in imports and quotes."""
    return set(re.findall(r"[A-Za-z_][A-Za-z_0-9]+", text))


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Output of the current generator."""
    return generated(tmp_path_factory.mktemp("protos"))


def test_generated_messages_match_the_proto_files(fresh: dict[str, str]) -> None:
    existing = {path.name for path in MESSAGES.iterdir() if "_pb2" in path.name}
    assert existing == set(fresh), "run `python -m tests.grpc.test_protos`"
    for name, text in fresh.items():
        stored = (MESSAGES / name).read_text(encoding="utf-8")
        if name.endswith(".py"):
            assert stored == text, f"{name} is old: run `python -m tests.grpc.test_protos`"
        else:
            new = {word for word in words(text) if word[0].isupper()}
            assert new <= words(stored), f"{name} is old: run `python -m tests.grpc.test_protos`"


def test_field_numbers_and_paths_match_the_contract() -> None:
    from headrace.grpc.messages import taskbroker_pb2 as wire

    activation = wire.TaskActivation(id="1", namespace="n", taskname="t", processing_deadline_duration=10)
    activation.received_at.FromSeconds(5)
    activation.retry_state.at_most_once = True
    activation.parameters_bytes = b"p"
    assert activation.SerializeToString() == b"\n\x011\x12\x01n\x1a\x01t2\x02\x08\x05:\x02 \x01@\nj\x01p"
    numbers = {field.name: field.number for field in wire.TaskActivation.DESCRIPTOR.fields}
    assert numbers == {
        "id": 1,
        "namespace": 2,
        "taskname": 3,
        "parameters": 4,
        "headers": 5,
        "received_at": 6,
        "retry_state": 7,
        "processing_deadline_duration": 8,
        "expires": 9,
        "delay": 11,
        "application": 12,
        "parameters_bytes": 13,
    }
    assert dict(wire.TaskActivationStatus.items())["TASK_ACTIVATION_STATUS_COMPLETE"] == 5
    methods = {
        f"/{service.full_name}/{method.name}"
        for service in wire.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    package = "sentry_protos.taskbroker.v1"
    assert methods == {
        f"/{package}.ConsumerService/GetTask",
        f"/{package}.ConsumerService/SetTaskStatus",
        f"/{package}.ConsumerService/SetBatchActivationStatus",
        f"/{package}.WorkerService/PushTask",
    }


def test_another_package_with_the_same_messages_can_be_loaded() -> None:
    program = (
        "from google.protobuf import descriptor_pool, descriptor_pb2\n"
        "from headrace.grpc.messages import taskbroker_pb2 as wire\n"
        "other = descriptor_pb2.FileDescriptorProto(name=wire.DESCRIPTOR.name, package=wire.DESCRIPTOR.package)\n"
        "other.message_type.add(name='TaskActivation')\n"
        "descriptor_pool.Default().AddSerializedFile(other.SerializeToString())\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        for name, text in generated(Path(place)).items():
            (MESSAGES / name).write_text(text, encoding="utf-8")
