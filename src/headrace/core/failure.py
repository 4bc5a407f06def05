"""Why a run failed, as it is kept and shown.

A failure is JSON wherever it goes (part, wire, output file), so one encoder serves all of them.
"""

from __future__ import annotations

from typing import Final

import msgspec

from headrace.foundation.errors import StoreBroken


class Failure(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One failed attempt: `type` is a class or code, `attempts` counts this one and those before it.

    `crashes` counts deaths of the worker that the run shared; `trace` is the task's own frames, shortened.
    """

    type: str
    message: str
    attempts: int = 0
    crashes: int = 0
    trace: str = ""

    def encode(self) -> bytes:
        """The failure as JSON. Text that can't be UTF-8 (lone surrogates) is escaped, never refused."""
        try:
            return _ENCODER.encode(self)
        except UnicodeEncodeError:
            clean = msgspec.structs.replace(
                self, type=_clean(self.type), message=_clean(self.message), trace=_clean(self.trace)
            )
            return _ENCODER.encode(clean)


def decode(data: bytes) -> Failure:
    """The failure that `encode` wrote."""
    try:
        return _DECODER.decode(data)
    except msgspec.DecodeError as error:
        raise StoreBroken("a stored failure is not one") from error


def crashed(*, crashes: int, attempts: int, evidence: str) -> Failure:
    """A run that was alone in its worker each of the last times the worker died."""
    return Failure(
        type="WorkerCrashed",
        message=f"the worker died {crashes} times while it ran this run{' alone' if crashes > 1 else ''}: {evidence}",
        attempts=attempts,
        crashes=crashes,
    )


def lost_once(*, attempts: int, evidence: str) -> Failure:
    """An at-most-once run whose worker died: whether it ran can't be known, so it is not run again."""
    return Failure(
        type="WorkerLost",
        message=f"the worker was lost after this at-most-once run was handed out: {evidence}",
        attempts=attempts,
        crashes=1,
    )


def _clean(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


_ENCODER: Final = msgspec.json.Encoder()
_DECODER: Final = msgspec.json.Decoder(Failure)
