"""Lanes that no worker serves, and the reason."""

from __future__ import annotations

import pytest

from headrace.core.serving import REASONS, Reason, Serving, StalledLane, WaitingLane, stalled_lanes

LANE = WaitingLane("mail", "send", is_paused=False)


@pytest.mark.parametrize(
    ("serving", "reason"),
    [
        ([], "no_worker"),
        ([Serving(environment="other")], "no_worker"),
        ([Serving(environment="here", tasks=("pack",))], "unknown_task"),
        ([Serving(environment="here", tasks=("send",), queues=("default",))], "other_queues"),
        ([Serving(environment="here", tasks=("pack",)), Serving(environment="here", queues=("x",))], "other_queues"),
        ([Serving(environment="here", queue_prefix="post:")], "other_queues"),
        ([Serving(environment="here")], None),
        ([Serving(environment="here", tasks=("send",), queues=("mail", "x"))], None),
        ([Serving(environment="here", tasks=("pack",)), Serving(environment="here", queue_prefix="ma")], None),
    ],
)
def test_a_lane_is_stalled_when_no_worker_of_its_environment_takes_it(
    serving: list[Serving], reason: Reason | None
) -> None:
    expected = [] if reason is None else [StalledLane("mail", "send", reason)]
    assert stalled_lanes([LANE], serving, "here") == expected


def test_a_paused_lane_is_stalled_although_a_worker_serves_it() -> None:
    lanes = [LANE._replace(is_paused=True), WaitingLane("default", "send", is_paused=False)]
    assert stalled_lanes(lanes, [Serving()], "default") == [StalledLane("mail", "send", "paused")]


@pytest.mark.parametrize("reason", REASONS)
def test_every_reason_has_a_hint(reason: Reason) -> None:
    assert StalledLane("mail", "send", reason).hint
