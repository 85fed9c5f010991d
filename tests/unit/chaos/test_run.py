"""A run under faults whose control goes away and stays away."""

from types import SimpleNamespace

import pytest

from phalanx.chaos import run as chaos
from phalanx.chaos.run import Chaos, ChaosOptions
from phalanx.chaos.schedule import FAULTS
from phalanx.errors import DeadlineExceeded, Unavailable


class ScriptedJob:
    """A job that commits a step per look, until control is gone."""

    id = "job-1"
    state = "RUNNING"
    done = False
    result = None

    def __init__(self, answers, error):
        self.progress = SimpleNamespace(step=0)
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


class Nobody:
    """No process that could be harmed or scraped."""

    roles = frozenset({"worker"})

    def living(self):
        return []

    def all_up(self):
        return True


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(chaos, "SETTLE_S", 0.0)
    monkeypatch.setattr(chaos, "LOOK_S", 0.001)
    monkeypatch.setattr(chaos, "ASK_EVERY_S", 0.001)


def _run(answers, error):
    options = ChaosOptions([FAULTS["kill-worker"]], every_s=0.02, duration_s=0.02, baseline_s=0)
    cluster = SimpleNamespace(events=list)
    return Chaos(cluster, ScriptedJob(answers, error), Nobody(), options)


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
    assert report.healthy
