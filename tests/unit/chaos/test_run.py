"""A run under faults whose control goes away and stays away."""

import itertools
from types import SimpleNamespace

import pytest

from phalanx.chaos import run as chaos
from phalanx.chaos.run import Chaos, ChaosOptions
from phalanx.chaos.schedule import FAULTS
from phalanx.chaos.victims import Victim
from phalanx.errors import DeadlineExceeded, Unavailable
from phalanx.v1.cluster_service_pb2 import Aggregator, GetClusterResponse


class ScriptedJob:
    """A job that commits a step per look, until control is gone."""

    id = "job-1"
    state = "RUNNING"
    done = False
    result = None

    def __init__(self, answers, error):
        self.progress = SimpleNamespace(step=0, workers=[SimpleNamespace(worker_id="worker-2")])
        self._answers = answers
        self._error = error

    def refresh(self):
        if not self._answers:
            raise self._error
        self._answers -= 1
        self.progress.step += 1
        return self

    def metrics(self, names):
        return self.refresh() and []


OWNERS = [
    Aggregator(id="aggregator-1", job_ids=["job-2"]),
    Aggregator(id="aggregator-2", job_ids=["job-1"]),
]
CLUSTER = SimpleNamespace(
    events=list, describe=lambda: GetClusterResponse(leader="control-2", aggregators=OWNERS)
)


class Nobody:
    """No process that could be harmed or scraped."""

    roles = frozenset({"worker"})

    def living(self):
        return []

    def all_up(self):
        return True


class Clock:
    """Time goes on in sleep, and a little whenever somebody looks at it."""

    def __init__(self):
        self._now_s = 1000.0

    def monotonic(self):
        self._now_s += 1e-6
        return self._now_s

    def sleep(self, seconds):
        self._now_s += seconds


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(chaos, "time", Clock())
    monkeypatch.setattr(chaos, "SETTLE_S", 0.0)
    monkeypatch.setattr(chaos, "LOOK_S", 0.001)
    monkeypatch.setattr(chaos, "ASK_EVERY_S", 0.001)


def _run(answers, error):
    options = ChaosOptions([FAULTS["kill-worker"]], every_s=0.02, duration_s=0.02, baseline_s=0)
    return Chaos(CLUSTER, ScriptedJob(answers, error), Nobody(), options)


@pytest.mark.parametrize("error", [Unavailable("refused"), DeadlineExceeded("no answer in 10 s")])
def test_a_control_that_stays_away_is_what_the_report_tells(impatient, error):
    run = _run(3, error)
    run.run()
    report = run.report()
    assert not report.healthy
    assert report.to_json()["control_answered"] is False
    assert [note for note in report.notes if error.message in note]


def test_a_control_that_is_there_again_has_answered(impatient):
    run = _run(100_000, Unavailable("refused"))
    run.run()
    report = run.report()
    assert report.control_answered
    assert (report.healthy, report.harmful, report.skipped) == (True, 0, 1)


class Everybody(Nobody):
    """Some of each role, told to be there; nobody is really harmed."""

    roles = frozenset({"worker", "control", "aggregator", "storage"})

    def __init__(self, ids):
        self._ids = ids

    def living(self):
        return [Victim(each, each.partition("-")[0], 1) for each in self._ids]


NAMES = [f"{role}-{number}" for role in ("worker", "control", "aggregator") for number in (1, 2, 3)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("fault", "there", "hit"),
    [
        ("kill-worker", NAMES, ("worker-2", False)),
        ("kill-control", NAMES, ("control-2", False)),
        ("kill-aggregator", NAMES, ("aggregator-2", False)),
        ("kill-aggregator", ["aggregator-1"], ("aggregator-1", True)),
        ("kill-storage", ["storage-1"], ("storage-1", False)),
    ],
)
def test_harm_is_done_where_the_job_is_if_it_can_be(
    impatient, monkeypatch, fault, there, hit, seed
):
    monkeypatch.setattr(chaos.Harm, "inflict", lambda *_: True)
    options = ChaosOptions([FAULTS[fault]], 0.05, duration_s=0.2, baseline_s=0.05, seed=seed)
    run = Chaos(CLUSTER, ScriptedJob(100_000, None), Everybody(there), options)
    run.run()
    assert [(each.victim, each.idle) for each in run.report().injuries] == [hit] * 4


def test_a_leader_that_does_not_know_yet_who_is_there_takes_nothing_back(impatient, monkeypatch):
    monkeypatch.setattr(chaos.Harm, "inflict", lambda *_: True)
    said = iter([CLUSTER.describe()])
    cluster = SimpleNamespace(events=list, describe=lambda: next(said, GetClusterResponse()))
    options = ChaosOptions([FAULTS["kill-aggregator"]], 0.05, duration_s=0.2, baseline_s=0.05)
    run = Chaos(cluster, ScriptedJob(100_000, None), Everybody(NAMES), options)
    run.run()
    assert {each.victim for each in run.report().injuries} == {"aggregator-2"}


def test_a_clock_that_is_set_moves_no_fault(impatient, monkeypatch):
    monkeypatch.setattr(chaos.Harm, "inflict", lambda *_: True)
    jumps_s = itertools.count(start=1, step=1000)
    monkeypatch.setattr(
        chaos.time, "time", lambda: chaos.time.monotonic() + next(jumps_s), raising=False
    )
    options = ChaosOptions([FAULTS["kill-worker"]], 0.1, duration_s=0.4, baseline_s=0.05)
    run = Chaos(CLUSTER, ScriptedJob(100_000, None), Everybody(NAMES), options)
    run.run()
    found = [each.at_s for each in run.report().injuries]
    assert [at_s >= 0.1 * number for number, at_s in enumerate(found)] == [True] * 4
    assert max(found) < 1000
