"""Trials that are promoted go on from where they were: on real processes, and in one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest

import phalanx
from phalanx.sdk.job import Job
from phalanx.sdk.methods import READ_TASK_RESULTS
from phalanx.sweeps.steps import TRIAL, rounds_of, steps_of
from phalanx.tasks import kept_holder, pins_holder
from phalanx.testing.arena import GUARD_S, wait_until
from phalanx.training import local as training
from phalanx.v1 import storage_service_pb2 as pb
from phalanx.v1.job_service_pb2 import ReadTaskResultsRequest
from phalanx.v1.storage_service_pb2_grpc import StorageServiceStub
from phalanx.v1.task_service_pb2 import TaskResult

ASHA: dict[str, Any] = {"asha": {"min_steps": 10}}
HALVING: dict[str, Any] = {"halving": {"min_steps": 10}}


def document(stopping: dict[str, Any], steps: int = 90) -> dict[str, Any]:
    train = {
        "model": {"mlp": {"hidden": [16]}},
        "optimizer": {"adam": {}},
        "batch_size": 64,
        "stop": {"steps": steps},
    }
    rates = [each / 1000 for each in range(1, 10)]
    grid = {"train.optimizer.adam.learning_rate": rates}
    sweep = {"base": {"train": train}, "grid": grid, "folds": 2, **stopping}
    return {"name": "search", "data": {"name": "digits"}, "sweep": sweep, "seed": 4}


@pytest.fixture
def storage(local: phalanx.LocalCluster) -> Iterator[StorageServiceStub]:
    with grpc.insecure_channel(local.process("storage").address) as channel:
        yield StorageServiceStub(channel)


def results_of(cluster: phalanx.Cluster, job: Job) -> dict[int, TaskResult]:
    pages = cluster.backend.stream(READ_TASK_RESULTS, ReadTaskResultsRequest(job_id=job.id))
    return {each.task: each for page in pages for each in page.results}


def tables_of(result: phalanx.Result) -> dict[str, str]:
    return {each.name: each.digest for each in result.files if not each.name.endswith(".png")}


def holders_of(storage: StorageServiceStub, first: str) -> list[str]:
    answer = storage.ListPins(pb.ListPinsRequest(after_holder=first), timeout=GUARD_S)
    return [each for each in answer.holders if each.startswith(first)]


def missing(storage: StorageServiceStub, digests: list[str]) -> set[str]:
    request = pb.CheckBlobsRequest(digests=digests)
    return set(storage.CheckBlobs(request, timeout=GUARD_S).missing)


def collect(storage: StorageServiceStub) -> None:
    storage.CollectGarbage(pb.CollectGarbageRequest(grace_s=0), timeout=GUARD_S)


def kept_by(results: dict[int, TaskResult]) -> dict[int, str]:
    return {task: each.kept.sha256.hex() for task, each in results.items() if each.HasField("kept")}


@pytest.mark.parametrize("stopping", [ASHA, HALVING], ids=["asha", "halving"])
def test_no_step_of_a_trial_is_trained_twice(
    alone: phalanx.Cluster, monkeypatch: pytest.MonkeyPatch, stopping: dict[str, Any]
) -> None:
    trained: list[int] = []
    run_leaf = training.run_leaf

    def counted(*of: Any) -> Any:
        trained.append(of[-2])
        return run_leaf(*of)

    monkeypatch.setattr(training, "run_leaf", counted)
    job = alone.submit(document(stopping))
    job.wait(timeout_s=GUARD_S)
    steps, rounds = steps_of(job.message.spec), rounds_of(job.message.spec)
    assert len(rounds) == 3
    ran = results_of(alone, job)
    entrants = [0, 0, 0]
    for task, step in enumerate(steps):
        entrants[step.round] += step.kind == TRIAL and ran[task].stored.size_bytes > 0
    lasts = [10, 30, 90]
    once = sum(
        count * (last - before)
        for count, last, before in zip(entrants, lasts, [0, *lasts], strict=False)
    )
    assert len(trained) == once + 90, "with the winner, on all rows"
    trained.clear()
    assert alone.verify(job).equal
    anew = sum(count * last for count, last in zip(entrants, lasts, strict=True))
    assert len(trained) == anew + 90, "a proof goes on from nothing that a job has kept"


@pytest.mark.parametrize("stopping", [ASHA, HALVING], ids=["asha", "halving"])
def test_trials_go_on_on_other_workers_and_leave_nothing(
    local: phalanx.LocalCluster,
    alone: phalanx.Cluster,
    storage: StorageServiceStub,
    stopping: dict[str, Any],
) -> None:
    expected = alone.submit(document(stopping)).wait(timeout_s=GUARD_S)
    job = local.submit(document(stopping))
    result = job.wait(timeout_s=GUARD_S)
    assert tables_of(result) == tables_of(expected)
    assert result.parameters_sha256 == expected.parameters_sha256
    results, steps = results_of(local, job), steps_of(job.message.spec)
    kept = kept_by(results)
    last = len(rounds_of(job.message.spec)) - 1
    assert kept.keys() == {
        task for task in results if steps[task].kind == TRIAL and steps[task].round < last
    }
    later = sum(steps[task].kind == TRIAL and steps[task].round > 0 for task in results)
    cached = [each for each in local.state_dir.rglob("worker*/**/*") if each.is_file()]
    fetched = {each.name for each in cached if each.name in kept.values()}
    # Workers have only what their leaf processes have asked for.
    assert len(fetched) == later > 0
    wait_until(lambda: not holders_of(storage, kept_holder(job.id, "")), "the end of the pins")
    collect(storage)
    assert missing(storage, list(kept.values())) == set(kept.values())
    assert holders_of(storage, pins_holder(job.id, "")), "results stay with the job"
    assert local.verify(job).equal


def begun(local: phalanx.LocalCluster, stopping: dict[str, Any]) -> Job:
    """A sweep that has states of trials in storage and is not near its end."""
    job = local.submit(document(stopping, steps=900) | {"name": "long"})
    wait_until(lambda: len(kept_by(results_of(local, job))) >= 2, "the first trials")
    return job


@pytest.mark.parametrize("ends", ["cancelled", "paused and cancelled"])
def test_a_sweep_that_is_cancelled_leaves_no_states_of_trials(
    local: phalanx.LocalCluster, storage: StorageServiceStub, ends: str
) -> None:
    job = begun(local, ASHA)
    if ends != "cancelled":
        job.pause()
        wait_until(lambda: job.refresh().state == "PAUSED", "the pause")
        kept = list(kept_by(results_of(local, job)).values())
        collect(storage)
        assert not missing(storage, kept), "who resumes goes on from them"
    job.cancel()
    wait_until(lambda: job.refresh().state == "CANCELLED", "the end")
    kept = list(kept_by(results_of(local, job)).values())
    wait_until(lambda: not holders_of(storage, kept_holder(job.id, "")), "the end of the pins")
    collect(storage)
    assert missing(storage, kept) == set(kept)


def test_states_of_trials_that_are_lost_cost_their_steps_and_no_bit(
    local: phalanx.LocalCluster, alone: phalanx.Cluster, storage: StorageServiceStub
) -> None:
    expected = alone.submit(document(ASHA, steps=900)).wait(timeout_s=GUARD_S)
    job = begun(local, ASHA)
    job.pause()
    wait_until(lambda: job.refresh().state == "PAUSED", "the pause")
    lost = list(kept_by(results_of(local, job)).values())
    for holder in holders_of(storage, kept_holder(job.id, "")):
        storage.SetPins(pb.SetPinsRequest(holder=holder), timeout=GUARD_S)
    collect(storage)
    assert missing(storage, lost) == set(lost)
    job.resume()
    result = job.wait(timeout_s=GUARD_S)
    assert tables_of(result) == tables_of(expected)
    assert result.parameters_sha256 == expected.parameters_sha256
    assert result.metrics["tasks/failed_tries"] == 0, "it is no failure of a task"
