"""Failures of runs, as stored and shown.

A failure is JSON everywhere (part, wire, output file), so one encoder serves all uses.
"""

from __future__ import annotations

from typing import Final

import msgspec

from headrace.foundation.errors import StoreBroken


class Failure(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One failed attempt: `type` is a class or code, `attempts` counts this attempt and those before it.

    `crashes` counts the crashes of workers in which the run was a suspect; `trace` has the task's own frames,
    shortened.
    """

    type: str
    message: str
    attempts: int = 0
    crashes: int = 0
    trace: str = ""

    def encode(self) -> bytes:
        """Encode the failure as JSON. Text that is not valid UTF-8 (lone surrogates) is escaped."""
        try:
            return _ENCODER.encode(self)
        except UnicodeEncodeError:
            clean = msgspec.structs.replace(
                self, type=_clean(self.type), message=_clean(self.message), trace=_clean(self.trace)
            )
            return _ENCODER.encode(clean)


def decode(data: bytes) -> Failure:
    """Decode what `encode` wrote. Raises `StoreBroken`."""
    try:
        return _DECODER.decode(data)
    except msgspec.DecodeError as error:
        raise StoreBroken("a stored failure is invalid") from error


def crashed(*, crashes: int, attempts: int, evidence: str) -> Failure:
    """Return the failure of a run that executed alone in its worker in each of the last crashes."""
    return Failure(
        type="WorkerCrashed",
        message=f"the worker crashed {crashes} times during this run{' alone' if crashes > 1 else ''}: {evidence}",
        attempts=attempts,
        crashes=crashes,
    )


def lost_once(*, attempts: int, evidence: str) -> Failure:
    """Return the failure of an at-most-once run whose worker ended: it may have run, so it is not run again."""
    return Failure(
        type="WorkerLost",
        message=f"the worker was lost after this at-most-once run was delivered: {evidence}",
        attempts=attempts,
        crashes=1,
    )


def _clean(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


_ENCODER: Final = msgspec.json.Encoder()
_DECODER: Final = msgspec.json.Decoder(Failure)
