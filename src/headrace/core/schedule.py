"""When a schedule ticks, and what becomes of ticks that came while nobody ran.

A rule answers one question, the first tick after a moment, and its ticks hang on nothing else: every process that
knows the rule names the same ones. What a time zone is, is told from outside (`tzinfo`); nothing here reads a clock.

Where clocks are put forward or back, cron's own two rules hold (Debian's; `cronsim` keeps them). A rule of fixed times
(neither its minute nor its hour begins with `*`) ticks once for each time it names: one that does not exist is moved to
the first moment that does, one that exists twice comes at its first. Any other rule goes with the time that passes:
what does not exist is not there, and what exists twice comes twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Final, Literal, NamedTuple, Protocol

from cronsim import CronSim, CronSimError

from headrace.foundation.errors import InvalidSetting

SECOND_US: Final = 1_000_000
EXPRESSION_CHARS_MAX: Final = 200
EVERY_S_MIN: Final = 1
EVERY_S_MAX: Final = 366 * 86_400
FIRST_US: Final = 946_684_800 * SECOND_US
"""The year 2000: a rule without a tick in the fifty years after it has none."""

_EVERY: Final = "every "
_EPOCH: Final = datetime.fromtimestamp(0, UTC)

CatchUp = Literal["skip", "once", "all"]


class Rule(Protocol):
    """When a schedule ticks. `expression` and `zone` name it, in the store and to people."""

    @property
    def expression(self) -> str:
        """As it was written, or `every … s`."""
        ...

    @property
    def zone(self) -> str:
        """The name of its time zone."""
        ...

    def after(self, moment_us: int) -> int | None:
        """The first tick strictly after a moment; None when there is none in fifty years."""
        ...


class Cron:
    """Five fields: minute, hour, day of month, month, day of week. Raises `InvalidSetting` for what is none."""

    def __init__(self, expression: object, zone: str, place: tzinfo) -> None:
        """`place` is what the time zone called `zone` is."""
        if not isinstance(expression, str) or len(expression) > EXPRESSION_CHARS_MAX:
            raise InvalidSetting(
                f"a cron expression has at most {EXPRESSION_CHARS_MAX} characters, not {expression!r:.60}", hint=_FORM
            )
        fields = expression.split()
        if len(fields) != 5:
            raise InvalidSetting(f"a cron expression has five fields, {expression!r} has {len(fields)}", hint=_FORM)
        self.expression = " ".join(fields)
        self.zone = zone
        self._place = place
        try:
            first_us = self.after(FIRST_US)
        except CronSimError as error:
            raise InvalidSetting(f"{expression!r} is no cron expression: {error}", hint=_FORM) from None
        if first_us is None:
            raise InvalidSetting(f"{expression!r} never comes: no day is such a day", hint=_FORM)

    def after(self, moment_us: int) -> int | None:
        """The first tick strictly after a moment."""
        # A time that was moved out of a gap may be one with the next, and one that comes twice may lie behind.
        for tick in CronSim(self.expression, moment_of(moment_us, self._place)):
            if (tick_us := _us_of(tick)) > moment_us:
                return tick_us
        return None


_FORM: Final = "write minute hour day month weekday, as in '*/5 * * * *' or '30 6 * * MON-FRI'"


class Every:
    """Each `every_s` seconds since 1970: whoever asks, and whenever it began, names the same moments."""

    zone = "UTC"

    def __init__(self, every_s: object) -> None:
        if (
            not isinstance(every_s, int | float)
            or isinstance(every_s, bool)
            or not EVERY_S_MIN <= every_s <= EVERY_S_MAX
        ):
            raise InvalidSetting(f"every_s is from {EVERY_S_MIN} to {EVERY_S_MAX} seconds, not {every_s!r}")
        self._every_us = round(every_s * SECOND_US)
        self.expression = f"{_EVERY}{self._every_us / SECOND_US:.15g} s"

    def after(self, moment_us: int) -> int:
        """The first tick strictly after a moment."""
        return (moment_us // self._every_us + 1) * self._every_us


def rule_of(expression: str, zone: str, place: tzinfo) -> Rule:
    """The rule that a store knows by these names. Raises `InvalidSetting`."""
    if expression.startswith(_EVERY):
        try:
            return Every(float(expression.removeprefix(_EVERY).removesuffix(" s")))
        except ValueError:
            raise InvalidSetting(f"{expression!r:.60} is no interval") from None
    return Cron(expression, zone, place)


def moment_of(moment_us: int, place: tzinfo) -> datetime:
    """A moment as people there write it."""
    return (_EPOCH + timedelta(microseconds=moment_us)).astimezone(place)


class Due(NamedTuple):
    """What is to be run now, oldest first, and up to where ticks are dealt with, the newest one that is due."""

    ticks_us: list[int]
    until_us: int
    missed_count: int
    """Ticks among those looked at that came while nobody ran and are not run."""


def due(rule: Rule, *, after_us: int, now_us: int, catch_up: CatchUp, grace_us: int, ticks_max: int) -> Due | None:
    """What to do about the ticks after one moment up to now; None when there are none.

    A tick is missed when it is `grace_us` old. `skip` runs none of the missed ones, `all` each of them, `once` the
    newest in the stead of all, unless a later tick runs anyway. At most `ticks_max` are run, the newest; what lies
    before those is passed over.
    """
    newest = _newest(rule, after_us, now_us, ticks_max)
    if not newest:
        return None
    fresh = [tick_us for tick_us in newest if tick_us > now_us - grace_us]
    wanted = newest if catch_up == "all" else fresh
    if catch_up == "once" and not fresh:
        wanted = newest[-1:]
    return Due(wanted, newest[-1], len(newest) - len(wanted))


def _newest(rule: Rule, after_us: int, now_us: int, ticks_max: int) -> list[int]:
    """The newest ticks of a stretch, at most `ticks_max`.

    A rule only goes forward. So it is asked from ever longer ago until there are enough, which costs about as many
    steps as there are answers, however long ago the stretch began.
    """
    window_us = SECOND_US * ticks_max
    while True:
        start_us = max(after_us, now_us - window_us)
        ticks = list(_between(rule, start_us, now_us))
        if len(ticks) >= ticks_max or start_us == after_us:
            return ticks[-ticks_max:]
        window_us *= 2


def _between(rule: Rule, after_us: int, now_us: int) -> Iterator[int]:
    tick_us = rule.after(after_us)
    while tick_us is not None and tick_us <= now_us:
        yield tick_us
        tick_us = rule.after(tick_us)


def _us_of(moment: datetime) -> int:
    return (moment - _EPOCH) // timedelta(microseconds=1)
