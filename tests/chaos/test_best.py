"""A job that keeps its best evaluation ends with the same one, whoever is killed."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import phalanx
from phalanx.cli.main import run
from phalanx.sdk.job import Job
from phalanx.sdk.values import BestEvaluation, Result
from phalanx.testing.arena import GUARD_S, Arena, add_blobs, arena, gated_job, wait_until

pytestmark = pytest.mark.slow

STEPS = 60
METRIC = "test/loss"


def keeping_job(**train: Any) -> dict[str, Any]:
    """The gated job with so high a rate that its loss falls and rises again: it is the least at
    step 40. Only the newest checkpoint is kept, so that of the best step is soon gone."""
    options: dict[str, Any] = {
        "optimizer": {"adam": {"learning_rate": 0.3}},
        "evaluation": {"every_steps": 5},
        "checkpoints": {"every_steps": 3, "keep": 1},
    }
    return gated_job(**{**options, **train}) | {"output": {"best": {"metric": METRIC}}}


@dataclass(frozen=True)
class Undisturbed:
    """What a job comes to in one process, without any cluster."""

    sha256: str
    best: BestEvaluation
    metrics: dict[str, float]

    def equals(self, result: Result) -> None:
        assert result.best == self.best
        assert result.parameters_sha256 == self.sha256
        assert dict(result.metrics) == self.metrics
        assert (result.steps, result.examples_lost, result.examples_doubled) == (STEPS, 0, 0)


def undisturbed(folder: Path, **train: Any) -> Undisturbed:
    os.environ["PHALANX_TEST_GATE"] = str(folder)
    with phalanx.LocalCluster(workers=0) as alone:
        add_blobs(alone)
        result = alone.submit(keeping_job(**train)).wait(timeout_s=GUARD_S)
        last = alone.submit({**keeping_job(**train), "output": {}}).wait(timeout_s=GUARD_S)
    assert result.best is not None
    assert 10 < result.best.step < STEPS - 10, "it is among the first or the last"
    assert result.parameters_sha256 != last.parameters_sha256
    return Undisturbed(result.parameters_sha256, result.best, dict(result.metrics))


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return undisturbed(tmp_path_factory.mktemp("gate"))


def killed(ring: Arena, job: Job, victims: dict[int, str]) -> None:
    """Kill a member each time when the job has come to a step; "worker" is one in a leaf.

    The gate is still held at the end.
    """
    for step, member in victims.items():
        caught = ring.caught_at(job, step)
        ring.signal(caught[0] if member == "worker" else member)


@pytest.mark.same_bits
def test_every_service_is_killed_and_the_job_is_paused(
    tmp_path: Path, expected: Undisturbed, capsys: pytest.CaptureFixture[str]
) -> None:
    with arena(tmp_path, 3) as ring:
        job = ring.submit(keeping_job())
        killed(ring, job, {7: "worker", 22: "aggregator-1", 36: "storage"})
        ring.caught_at(job, 43)
        so_far = job.refresh().progress.best
        assert so_far == expected.best, "the best one is known since step 40"
        ring.signal("control-1")
        ring.caught_at(job, 47)
        job.pause()
        ring.gate.release()
        wait_until(lambda: job.refresh().state == "PAUSED", "the pause")
        assert job.progress.best == expected.best
        ring.cluster.gc()  # whatever nothing names any more is gone
        ring.gate.hold()
        job.resume()
        killed(ring, job, {52: "aggregator-1"})
        ring.gate.release()
        expected.equals(job.wait(timeout_s=GUARD_S))
        assert len(ring.events("STEPS_REPLAYED")) >= 2
        assert ring.cluster.verify(job).equal

        address = ring.cluster.address
        assert run(["--address", address, "show", job.id]) == 0
        shown = capsys.readouterr().out
        assert f"best           step {expected.best.step}, by {METRIC}" in shown
        assert run(["--address", address, "watch", job.id]) == 0
        shown = capsys.readouterr().out
        assert f"best {METRIC}={expected.best.value:.4f}@{expected.best.step}" in shown


@pytest.mark.same_bits
def test_members_of_an_all_reduce_job_are_killed_one_by_one_and_all_at_once(
    tmp_path: Path, expected: Undisturbed
) -> None:
    with arena(tmp_path, 3) as ring:
        job = ring.submit(keeping_job(all_reduce={}))
        killed(ring, job, {7: "worker", 38: "worker", 41: "worker"})
        ring.caught_at(job, 46)
        workers = [f"worker-{number}" for number in (1, 2, 3)]
        # The one that was killed last may be about to start.
        wait_until(lambda: all(ring.cluster.process(each).pid for each in workers), "all workers")
        for each in workers:
            ring.signal(each)
        ring.gate.release()
        expected.equals(job.wait(timeout_s=GUARD_S))
        assert ring.events("STEPS_REPLAYED")


@pytest.mark.same_bits
def test_a_job_that_goes_on_from_another_one_keeps_what_that_one_had(
    tmp_path: Path, expected: Undisturbed
) -> None:
    with arena(tmp_path, 2) as ring:
        first = ring.cluster.submit(keeping_job(stop={"steps": 47}))
        first.wait(timeout_s=GUARD_S)
        rare = {"every_steps": 100}
        job = ring.submit(keeping_job(start={"job": first.id}, checkpoints=rare))
        killed(ring, job, {49: "aggregator-1"})  # it has no checkpoint of its own
        ring.gate.release()
        expected.equals(job.wait(timeout_s=GUARD_S))
        assert ring.cluster.verify(job).equal

        # By another rule it is not the best, and the first job may be gone.
        other = keeping_job(start={"job": first.id}) | {"output": {"best": {"metric": METRIC}}}
        other["output"]["best"]["at_most"] = expected.best.value / 2
        result = ring.cluster.submit(other).wait(timeout_s=GUARD_S)
        assert result.best is None
        assert result.parameters_sha256 != expected.sha256


@pytest.mark.same_bits
def test_local_steps(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    local = {"local": {"steps": 2}, "optimizer": {"adam": {"learning_rate": 0.1}}}
    alone = undisturbed(tmp_path_factory.mktemp("gate"), **local)
    with arena(tmp_path, 3) as ring:
        job = ring.submit(keeping_job(**local))
        killed(ring, job, {9: "worker", alone.best.step + 2: "aggregator-1"})
        ring.gate.release()
        alone.equals(job.wait(timeout_s=GUARD_S))


@pytest.mark.parametrize(
    "mode", [{"asynchronous": {"replay_log": True}}, {"stale": {"bound": 2, "replay_log": True}}]
)
def test_contributions_that_commit_one_by_one(
    tmp_path: Path, mode: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with arena(tmp_path, 3) as ring:
        monkeypatch.setenv("PHALANX_TEST_GATE", str(ring.gate.folder))
        job = ring.submit(keeping_job(**mode))
        killed(ring, job, {7: "worker", 22: "aggregator-1", 46: "aggregator-1"})
        ring.gate.release()
        result = job.wait(timeout_s=GUARD_S)
        assert result.best is not None
        assert result.best.step % 5 == 0
        assert result.metrics[METRIC] == result.best.value
        assert (result.steps, result.examples_lost, result.examples_doubled) == (STEPS, 0, 0)
        # In the order of its log it comes to the same evaluations, and the same best one.
        verdict = ring.cluster.verify(job)
        assert verdict.equal
        assert verdict.balanced
