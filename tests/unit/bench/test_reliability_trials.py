"""What counts as a trial of the figures under faults: only what shows what it is said to show."""

import os
import sys
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest

from bench.reliability import kills
from bench.reliability.control import take_over_unix_s
from bench.reliability.fencing import goes_on
from bench.reliability.jobs import (
    LEAF_S_VARIABLE,
    MARKS_VARIABLE,
    PATIENT_MODEL,
    leaf_times,
    open_leaf_s,
)
from bench.reliability.joins import Joins, pause_rows
from bench.reliability.rows import Rows
from phalanx.chaos.report import Commit, Span
from phalanx.errors import Unavailable
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


def test_a_leaf_that_began_and_was_not_computed_is_owed(tmp_path):
    assert open_leaf_s(tmp_path, [1, 2]) is None
    (tmp_path / "began-2").write_text("7.5\n8.25\n")
    (tmp_path / "2").write_text("8.0\n")
    assert open_leaf_s(tmp_path, [1, 2]) == 8.25
    assert open_leaf_s(tmp_path, [1]) is None
    (tmp_path / "2").write_text("8.0\n8.5\n")
    assert open_leaf_s(tmp_path, [1, 2]) is None


def test_the_marks_of_leaves_are_made(tmp_path, monkeypatch):
    """The job of the figures marks a leaf when it begins and when it is computed."""
    monkeypatch.setenv(MARKS_VARIABLE, str(tmp_path))
    monkeypatch.delenv(LEAF_S_VARIABLE, raising=False)
    seen = []

    class Softmax:
        def loss_and_gradients(self, *_):
            seen.append(open_leaf_s(tmp_path, [os.getpid()]) is not None)

    monkeypatch.setitem(sys.modules, "softmax", SimpleNamespace(Softmax=Softmax))
    namespace = {}
    exec(PATIENT_MODEL, namespace)
    namespace["Patient"]().loss_and_gradients(None, None, None)
    assert seen == [True]
    assert open_leaf_s(tmp_path, [os.getpid()]) is None
    assert len(leaf_times(tmp_path, os.getpid())) == 1


def test_computing_what_was_owed_anew_is_not_counted():
    row = kills.row_of([0.25, 0.39], 5, "command", quick=False)
    assert (row.value, row.trials, row.reached) == (pytest.approx(0.29), 2, True)
    assert "3 more kills" in row.note
    assert not kills.row_of([0.25, 0.41], 2, "command", quick=False).reached


def test_a_pause_is_what_no_undisturbed_gap_was_and_the_worst_of_all():
    made = Rows("command", quick=False)
    calm, joining = [Span(0, 2), Span(4, 6)], [Span(2, 4), Span(6, 8)]

    def pause(*times):
        commits = [Commit(step, time) for step, time in enumerate(times)]
        return pause_rows(made, Joins([], calm, joining, joining, commits))[0]

    steady = pause(0, 0.4, 0.8, 1.3, 1.7, 2.1, 2.6, 3.0, 4.2, 4.6, 5, 5.5, 6, 6.5, 7, 7.5, 8)
    assert (steady.value, steady.reached, steady.trials) == (0, True, 2)
    late = pause(0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 5.5, 6, 6.7, 7.2, 7.7, 8.2)
    assert (late.value, late.reached) == (pytest.approx(0.2), False), "one of the two is enough"
    varied = pause(0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.8, 5.4, 6, 6.9, 7.2, 7.7, 8.2)
    assert (varied.value, varied.reach) == (pytest.approx(0.1), "<= 0.3"), "0.5 and 0.8 s before"
    assert varied.reached
    assert not pause(0, 1, 2, 3, 4, 5).reached, "nothing was committed while the second joined"


def test_what_the_start_of_any_process_costs_is_told_besides():
    commits = [
        Commit(step, time) for step, time in enumerate((0, 0.4, 0.8, 1.2, 1.9, 2.3, 3.1, 3.5))
    ]
    joins = Joins([], [Span(0, 1)], [Span(2, 3.2)], [Span(1.1, 2)], commits)
    plain, beyond = pause_rows(Rows("command", quick=False), joins)
    assert (plain.name, plain.value) == ("worker_restart_pause_s", pytest.approx(0.3))
    assert (beyond.name, beyond.value) == ("worker_restart_pause_beyond_a_start_s", 0)


def test_a_job_that_no_member_computes_any_more_does_not_go_on():
    class Job:
        def __init__(self, *steps, done=False):
            self.steps, self.done = list(steps), done

        def refresh(self):
            step = self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]
            if step is None:
                raise Unavailable("nobody leads")
            self.progress = SimpleNamespace(step=step)
            return self

    assert goes_on(Job(7, None, 8, 9, 10), guard_s=60)
    assert goes_on(Job(20, 15, 16, 18), guard_s=60), "it went back to a checkpoint first"
    assert goes_on(Job(7, done=True), guard_s=60)
    assert not goes_on(Job(7, 8, 9), guard_s=0.1)
