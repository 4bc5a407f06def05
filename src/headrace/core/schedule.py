"""The ticks of schedules, and the handling of ticks that came while no process ran.

A rule answers one question: the first tick after a time. Its ticks depend on nothing else, so every process that knows
the rule computes the same ones. Time zones are passed in (`tzinfo`), and nothing here reads a clock.

At changes of daylight saving time cron's own two rules hold (Debian's; `cronsim` implements them). A rule of fixed
times (neither its minute nor its hour begins with `*`) ticks once for each time that it names: a time that does not
exist is moved to the next one that does, and a time that exists twice ticks at its first. Any other rule follows the
elapsed time: a time that does not exist has no tick, and one that exists twice has two.
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
    """The times at which a schedule ticks. `expression` and `zone` name it, in the store and to people."""

    @property
    def expression(self) -> str:
        """The expression as written, or `every … s`."""
        ...

    @property
    def zone(self) -> str:
        """The name of its time zone."""
        ...

    def after(self, moment_us: int) -> int | None:
        """Return the first tick strictly after a time; None if there is none in fifty years."""
        ...


class Cron:
    """A cron expression of five fields: minute, hour, day of month, month, day of week. Raises `InvalidSetting`."""

    def __init__(self, expression: object, zone: str, zone_info: tzinfo) -> None:
        """`place` is the time zone with the name `zone`."""
        if not isinstance(expression, str) or len(expression) > EXPRESSION_CHARS_MAX:
            raise InvalidSetting(
                f"cron: expected at most {EXPRESSION_CHARS_MAX} characters, got {expression!r:.60}", hint=_FORM
            )
        fields = expression.split()
        if len(fields) != 5:
            raise InvalidSetting(f"cron: expected five fields, got {len(fields)} in {expression!r}", hint=_FORM)
        self.expression = " ".join(fields)
        self.zone = zone
        self._zone_info = zone_info
        try:
            first_us = self.after(FIRST_US)
        except CronSimError as error:
            raise InvalidSetting(f"cron: invalid expression {expression!r}: {error}", hint=_FORM) from None
        if first_us is None:
            raise InvalidSetting(f"cron: {expression!r} never occurs: no day matches", hint=_FORM)

    def after(self, moment_us: int) -> int | None:
        """Return the first tick strictly after a time."""
        # A time that was moved out of a gap may equal the next one, and one that exists twice may be in the past.
        for tick in CronSim(self.expression, moment_of(moment_us, self._zone_info)):
            if (tick_us := _us_of(tick)) > moment_us:
                return tick_us
        return None


_FORM: Final = "write minute hour day month weekday, as in '*/5 * * * *' or '30 6 * * MON-FRI'"


class Every:
    """Ticks every `every_s` seconds since 1970: every process computes the same times."""

    zone = "UTC"

    def __init__(self, every_s: object) -> None:
        if (
            not isinstance(every_s, int | float)
            or isinstance(every_s, bool)
            or not EVERY_S_MIN <= every_s <= EVERY_S_MAX
        ):
            raise InvalidSetting(f"every_s: expected {EVERY_S_MIN} to {EVERY_S_MAX} seconds, got {every_s!r}")
        self._every_us = round(every_s * SECOND_US)
        self.expression = f"{_EVERY}{self._every_us / SECOND_US:.15g} s"

    def after(self, moment_us: int) -> int:
        """Return the first tick strictly after a time."""
        return (moment_us // self._every_us + 1) * self._every_us


def rule_of(expression: str, zone: str, zone_info: tzinfo) -> Rule:
    """Return the rule with this stored expression and zone. Raises `InvalidSetting`."""
    if expression.startswith(_EVERY):
        try:
            return Every(float(expression.removeprefix(_EVERY).removesuffix(" s")))
        except ValueError:
            raise InvalidSetting(f"invalid interval: {expression!r:.60}") from None
    return Cron(expression, zone, zone_info)


def moment_of(moment_us: int, zone_info: tzinfo) -> datetime:
    """Return a time in a time zone."""
    return (_EPOCH + timedelta(microseconds=moment_us)).astimezone(zone_info)


class Due(NamedTuple):
    """Ticks to run now, oldest first, and `until_us`, the newest due tick, up to which ticks are handled."""

    ticks_us: list[int]
    until_us: int
    missed_count: int
    """Number of checked ticks that came while no process ran and are not run."""


def due(rule: Rule, *, after_us: int, now_us: int, catch_up: CatchUp, grace_us: int, ticks_max: int) -> Due | None:
    """Decide about the ticks after `after_us` up to now; None if there are none.

    A tick is missed if it is `grace_us` old. `skip` runs none of the missed ones, `all` each of them, `once` the newest
    in place of all, unless a later tick runs anyway. At most `ticks_max` are run, the newest; earlier ones are skipped.
    """
    newest = _newest(rule, after_us, now_us, ticks_max)
    if not newest:
        return None
    fresh = [tick_us for tick_us in newest if tick_us > now_us - grace_us]
    selected = newest if catch_up == "all" else fresh
    if catch_up == "once" and not fresh:
        selected = newest[-1:]
    return Due(selected, newest[-1], len(newest) - len(selected))


def _newest(rule: Rule, after_us: int, now_us: int, ticks_max: int) -> list[int]:
    """Return the newest ticks of an interval, at most `ticks_max`.

    A rule only goes forward. It is therefore evaluated from ever earlier times until there are enough ticks, which
    costs about as many steps as there are answers, however long the interval is.
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
