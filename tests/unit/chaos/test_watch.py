"""Steps as they are seen: rising, forgotten after a roll-back, from whoever moves."""

import pytest

from phalanx.chaos import watch
from phalanx.chaos.report import Commit
from phalanx.chaos.victims import Victim
from phalanx.chaos.watch import Gauges, StepLog, parse

PAGE = """\
# TYPE phalanx_job_step gauge
phalanx_job_step{job_id="a"} 12.0
phalanx_job_step{job_id="b"} 99.0
phalanx_job_examples_lost_total{job_id="a"} 3.0
phalanx_job_examples_lost_created{job_id="a"} 1.7e+09
phalanx_job_examples_doubled_total{job_id="a"} 0.0
"""


def test_a_step_counts_from_when_it_was_first_seen():
    log = StepLog()
    for step, at_s in [(1, 0.0), (1, 0.1), (3, 0.2)]:
        log.saw(step, at_s)
    assert log.better([]) == [Commit(1, 0.0), Commit(3, 0.2)]


def test_what_was_rolled_back_is_forgotten():
    log = StepLog()
    for step, at_s in [(4, 0), (5, 1), (6, 2), (4, 5), (5, 6)]:
        log.saw(step, at_s)
    assert log.better([]) == [Commit(4, 0), Commit(5, 6)]


def test_recorded_times_are_better_unless_they_are_fewer():
    log = StepLog()
    log.saw(1, 0.05)
    log.saw(2, 1.05)
    assert log.better([Commit(1, 0.0), Commit(2, 1.0)]) == [Commit(1, 0.0), Commit(2, 1.0)]
    log.saw(3, 2.05)
    recorded = [Commit(0, -1.0), Commit(1, 0.0), Commit(2, 1.0)]
    assert log.better(recorded) == [*recorded, Commit(3, 2.05)], "not recorded yet"
    log.saw(2, 2.1)
    assert log.better([Commit(2, 1.0)]) == [Commit(1, 0.05), Commit(2, 1.05)]


@pytest.mark.parametrize("off_s", [-30.0, 0.6, 30.0])
def test_times_by_the_clock_of_another_machine_are_no_better(off_s: float):
    log = StepLog()
    for step in range(1, 10):
        log.saw(step, step + 0.05)
    recorded = [Commit(step, step + off_s) for step in range(1, 10)]
    assert log.better(recorded) == [Commit(step, step + 0.05) for step in range(1, 10)]


def test_a_page_of_metrics():
    assert parse(PAGE, "a") == {"step": 12, "examples_lost_total": 3, "examples_doubled_total": 0}
    assert parse(PAGE, "c") == {}


def test_only_who_moves_tells_the_step(monkeypatch: pytest.MonkeyPatch):
    pages = {"old": {"step": 40, "examples_lost_total": 0}, "new": {}}
    monkeypatch.setattr(watch, "_scrape", lambda address, job_id: pages[address])
    old, new = (Victim(id, "aggregator", pid, id) for pid, id in ((1, "old"), (2, "new")))
    worker = Victim("worker-1", "worker", 3, "worker")
    gauges = Gauges("a")
    assert gauges.read([old, new, worker]) == 40
    assert gauges.read([old, new]) is None
    # The job went back to its checkpoint, and another one has it now.
    pages["new"] = {"step": 31, "examples_lost_total": 2}
    assert gauges.read([old, new]) == 31
    assert (gauges.lost, gauges.doubled) == (2, None)
