"""What counts as a trial of the figures under faults: only what shows what it is said to show."""

from datetime import UTC, datetime

import pytest

from bench.reliability.control import take_over_unix_s
from phalanx.sdk.values import Event


def _event(unix_s, kind, message):
    time = datetime.fromtimestamp(unix_s, UTC)
    return Event(1, time, kind, message, "", "", "", None, None, {})


def test_a_standby_leads_once_another_than_the_victim_does():
    events = [
        _event(1.0, "CONTROL_TOOK_OVER", "control-1 leads generation 1"),
        _event(9.0, "WORKER_LOST", "worker-1 was lost"),
    ]
    assert take_over_unix_s(events, 8.0, "control-1") is None
    events.append(_event(9.5, "CONTROL_TOOK_OVER", "control-2 leads generation 2 in the place …"))
    assert take_over_unix_s(events, 8.0, "control-1") == 9.5


def test_the_victim_that_leads_again_is_no_standby():
    again = _event(9.0, "CONTROL_TOOK_OVER", "control-1 leads generation 2")
    with pytest.raises(AssertionError, match="leads again"):
        take_over_unix_s([again], 8.0, "control-1")
