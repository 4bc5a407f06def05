"""Retry policies: whether a failed attempt is followed by another, and when.

Pure: time and random numbers are arguments. A policy is checked when it is created, so a decision never fails.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, get_args

from headrace.foundation.errors import InvalidInput, InvalidSetting
from headrace.foundation.suggestions import names_checked

Backoff: TypeAlias = Literal["exponential", "linear", "constant"]

ATTEMPTS_MAX: Final = 1_000_000
FACTOR_MAX: Final = 1_000.0
DELAY_S_MAX: Final = 365 * 86_400.0
"""Longest delay of a retry: one year."""

SECOND_US: Final = 1_000_000
STEP_US_MIN: Final = 10_000
STEPS_IN_DELAY_MIN: Final = 20
"""Quantising moves a due time by at most one twentieth, 5 %, of its delay."""


def is_number_within(value: object, least: float, most: float) -> bool:
    """True if `value` is a number in the range; False for NaN, which compares with nothing, and for a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


class RetryAfter(Exception):
    """Raised by a task to be retried in `seconds` instead of its policy's delay; it uses an attempt.

    `seconds` is from 0 to 365 days. On its last attempt the run fails with this error.
    """

    def __init__(self, seconds: float) -> None:
        if not is_number_within(seconds, 0, DELAY_S_MAX):
            raise InvalidInput(
                f"RetryAfter: expected 0 to {DELAY_S_MAX:.0f} seconds, got {seconds!r}",
                hint="a retry can be delayed by at most 365 days",
            )
        super().__init__(seconds)
        self.seconds = seconds

    def __str__(self) -> str:
        return f"the task asked for a retry in {self.seconds} s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """The number of attempts of a task and the delays between them. One attempt, the default, is no retry.

    After attempt n (from 1) the delay is, before jitter and at most `delay_max_s`:

        exponential   delay_s * factor ** (n - 1)
        linear        delay_s * n
        constant      delay_s

    `jitter` is the fraction of a delay that is randomly subtracted, so `delay_max_s` holds with it. 1 is the "full
    jitter" and 0.5 the "equal jitter" of M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015. An
    error is retried if it is one of `retry_on` and none of `give_up_on`. Raises `InvalidSetting`.
    """

    attempts: int = 1
    backoff: Backoff = "exponential"
    delay_s: float = 1.0
    factor: float = 2.0
    delay_max_s: float = 3_600.0
    jitter: float = 0.1
    retry_on: tuple[type[BaseException], ...] = (Exception,)
    give_up_on: tuple[type[BaseException], ...] = ()

    def __post_init__(self) -> None:
        attempts: object = self.attempts
        if not isinstance(attempts, int) or isinstance(attempts, bool) or not 1 <= attempts <= ATTEMPTS_MAX:
            raise InvalidSetting(
                f"attempts: expected an integer from 1 to {ATTEMPTS_MAX}, got {attempts!r}",
                hint="attempts counts the first one too: 1 is no retry",
            )
        if self.backoff not in get_args(Backoff):
            raise InvalidSetting(f"backoff: expected one of {', '.join(get_args(Backoff))}, got {self.backoff!r}")
        for name, least, most in (
            ("delay_s", 0.0, DELAY_S_MAX),
            ("factor", 1.0, FACTOR_MAX),
            ("delay_max_s", 0.0, DELAY_S_MAX),
            ("jitter", 0.0, 1.0),
        ):
            value = getattr(self, name)
            if not is_number_within(value, least, most):
                raise InvalidSetting(f"{name}: expected a number from {least} to {most}, got {value!r}")
        if self.delay_s > self.delay_max_s:
            raise InvalidSetting(
                f"delay_s ({self.delay_s}) exceeds delay_max_s ({self.delay_max_s})",
                hint="raise delay_max_s, which limits every delay",
            )
        for name in ("retry_on", "give_up_on"):
            classes = getattr(self, name)
            if not isinstance(classes, tuple) or not all(
                isinstance(error_class, type) and issubclass(error_class, BaseException) for error_class in classes
            ):
                raise InvalidSetting(
                    f"{name}: expected a tuple of exception classes, got {classes!r}",
                    hint=f"write {name}=(TimeoutError,), with the comma",
                )


# The generated method would raise a `TypeError` for an unknown option.
setattr(Retry, "__init__", names_checked("Retry()")(Retry.__init__))  # noqa: B010 - mypy refuses the assignment

NO_RETRY: Final = Retry(attempts=1)


def retry_at_us(
    policy: Retry, *, attempt: int, error: BaseException, now_us: int, random: Callable[[], float]
) -> int | None:
    """Return when the next attempt is due after `attempt` (from 1) failed with `error`; None to give up.

    `random` returns a number from 0 up to 1, as `random.random` does; it is called only if there is jitter.
    """
    if attempt < 1:
        raise InvalidInput("expected an attempt of at least 1", attempt=attempt)
    if attempt >= policy.attempts:
        return None
    if isinstance(error, RetryAfter):
        return now_us + math.ceil(error.seconds * SECOND_US)
    if isinstance(error, policy.give_up_on) or not isinstance(error, policy.retry_on):
        return None
    delay_s = _delay_s(policy, attempt)
    if policy.jitter:
        delay_s *= 1.0 - policy.jitter * random()
    return now_us + round(delay_s * SECOND_US)


def quantised_due_us(due_us: int, now_us: int) -> int:
    """Return a due time at or soon after `due_us` that many runs share, so that they wait in one row.

    Later by less than 5 % of the delay, or 10 ms if that is more. The grid is absolute, and its step is 10 ms doubled
    as often as 5 % of the delay allows. Retries of similar delays therefore meet on it even if they failed at different
    times. Runs whose due time has passed are all due now: a store that falls behind would otherwise write a row a run.
    """
    delay_us = due_us - now_us
    if delay_us <= 0:
        return now_us
    doublings = max(delay_us // (STEPS_IN_DELAY_MIN * STEP_US_MIN), 1).bit_length() - 1
    step_us = STEP_US_MIN << doublings
    return -(-due_us // step_us) * step_us


def _delay_s(policy: Retry, attempt: int) -> float:
    if policy.backoff == "constant":
        return policy.delay_s
    if policy.backoff == "linear":
        return min(policy.delay_s * attempt, policy.delay_max_s)
    try:
        grown = policy.delay_s * float(policy.factor) ** (attempt - 1)
    except OverflowError:  # a power beyond the range of floats exceeds any limit, unless it multiplies zero
        grown = policy.delay_max_s if policy.delay_s else 0.0
    return min(grown, policy.delay_max_s)
