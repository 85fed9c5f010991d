"""What verifying finds: the ledger of every kind of job, and its bits where they can be had."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

import phalanx
from phalanx import numeric_fingerprint
from phalanx.blas import one_blas_thread
from phalanx.data import model_files
from phalanx.data.manifest import DatasetManifest
from phalanx.errors import DataLoss, FailedPrecondition, NotFound
from phalanx.sdk.cluster import Cluster
from phalanx.sdk.job import Job
from phalanx.sdk.methods import LIST_CHECKPOINTS, READ_TASK_RESULTS
from phalanx.sdk.verdict import TaskLedger
from phalanx.sdk.verification import replay_log_of
from phalanx.specs import job_plan
from phalanx.training.expected import expected_of_shard
from phalanx.training.left_out import LeftOutLog
from phalanx.training.local import train_in_process
from phalanx.training.replay import ReplayLog
from phalanx.v1.job_service_pb2 import ReadTaskResultsResponse
from phalanx.v1.storage_service_pb2 import (
    CheckpointManifest,
    CheckpointPart,
    ListCheckpointsResponse,
)
from phalanx.v1.task_service_pb2 import TaskResult
from tests.unit.sdk.nets import net

SHARDS, ROWS, EPOCHS = 4, 240, 3

BROKEN = net("""
gradient = {"w": np.ones_like(parameters["w"])}
return (np.nan if features[:, 0].max() > 2.5 else 1.0), gradient
""")


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    monkeypatch.setenv("PHALANX_CACHE", str(tmp_path))
    features = np.random.default_rng(7).normal(size=(ROWS, 3))
    with phalanx.LocalCluster(workers=0) as cluster:
        cluster.data.add("toy", features, np.where(features[:, 0] > 0, "yes", "no"))
        yield cluster


def submitted(local: Any, train: dict[str, Any] | None = None, **more: Any) -> Job:
    program = {"model": {"softmax_regression": {}}, "batch_size": 64, "stop": {"epochs": EPOCHS}}
    data = {"name": "toy", "shards": SHARDS}
    job = local.submit({"name": "toy", "data": data, "train": {**program, **(train or {})}, **more})
    job.wait(60)
    return job


def stored_of(local: Any, job: Job) -> Any:
    """What this process remembers of a job, to be written over."""
    return local.backend._jobs._jobs[job.id].job


class Elsewhere:
    """The backend of a cluster on which the job has left this checkpoint."""

    address = "127.0.0.1:7410"

    def __init__(self, inner: Any, *checkpoints: CheckpointManifest) -> None:
        self._inner = inner
        self._checkpoints = checkpoints

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def call(self, method: Any, *arguments: Any, **more: Any) -> Any:
        if method is LIST_CHECKPOINTS:
            return ListCheckpointsResponse(checkpoints=self._checkpoints)
        return self._inner.call(method, *arguments, **more)


def checkpoint_of(
    local: Any, job: Job, log: ReplayLog | LeftOutLog | None = None, **state: Any
) -> CheckpointManifest:
    """What the job would have left on a cluster."""
    assert job.result is not None
    steps = job.result.steps
    vectors = {"parameters": np.zeros(2, np.float32)}
    if log is not None:
        vectors |= log.vectors(np.dtype("<f4"))
    digest = local.backend.put_blob(safetensors.numpy.save(vectors))
    root = {"examples": job.message.progress.examples, "completed_steps": [steps] * SHARDS}
    return CheckpointManifest(
        step=steps,
        final=True,
        root_state=json.dumps({**root, **state}),
        parts=[CheckpointPart(digest=digest)],
    )


def elsewhere(local: Any, *checkpoints: CheckpointManifest) -> Cluster:
    return Cluster(Elsewhere(local.backend, *checkpoints))


def turns(job: Job) -> list[int]:
    assert job.result is not None
    return [commit % SHARDS for commit in range(job.result.steps * SHARDS)]


def log_of(shards: list[int]) -> ReplayLog:
    log = ReplayLog()
    for shard in shards:
        log.add(shard, 0)
    return log


MODES: dict[str, dict[str, Any]] = {
    "synchronous": {},
    "asynchronous": {"asynchronous": {}},
    "stale": {"stale": {"bound": 2}},
    "local": {"local": {"steps": 2}},
    "Krum": {"reduction": {"krum": {"faulty": 0}}},
    "top-k": {"compression": {"top_k": {"fraction": 0.2}}},
}


@pytest.mark.parametrize("mode", MODES)
def test_every_example_was_used_once_in_each_epoch(local: Any, mode: str) -> None:
    verdict = local.verify(submitted(local, MODES[mode]))
    assert verdict.equal
    assert verdict.balanced
    assert not verdict.wrong
    shown = verdict.to_json()
    assert (shown["equal"], shown["compared"], shown["balanced"]) == (True, True, True)
    ledger = shown["ledger"]
    assert (ledger["epochs"], ledger["exact_epochs"]) == (EPOCHS, EPOCHS)
    assert ledger["used"] == EPOCHS * ROWS
    assert (ledger["left_out"], ledger["doubled"], ledger["missing"]) == (0, 0, 0)


def test_examples_that_were_left_out_are_named(local: Any) -> None:
    model = {"custom": {"entrypoint": "net:Net"}}
    code = {"files": {"net.py": BROKEN}}
    skip = {"skip": {"max_steps": 0}}
    job = submitted(local, {"model": model, "on_nonfinite": skip}, code=code)
    assert job.result is not None
    assert job.result.examples_lost > 0
    verdict = local.verify(job)
    assert verdict.equal
    assert verdict.ledger is not None
    assert verdict.ledger.problems == ()
    assert verdict.ledger.left_out == job.result.examples_lost
    assert sum(each.examples for each in verdict.ledger.named) == job.result.examples_lost
    stored_of(local, job).result.examples_lost += 1
    assert local.verify(job).wrong


def test_what_the_job_says_of_itself_must_be_what_was_used(local: Any) -> None:
    job = submitted(local)
    stored_of(local, job).progress.examples -= 1
    verdict = local.verify(job)
    assert verdict.equal
    assert not verdict.balanced
    assert verdict.wrong


LOGGED = {"asynchronous": {"replay_log": True}}


@pytest.mark.parametrize("train", [LOGGED, {"stale": {"bound": 2, "replay_log": True}}])
def test_a_log_is_followed_and_counted(local: Any, train: dict[str, Any]) -> None:
    job = submitted(local, train)
    cluster = elsewhere(local, checkpoint_of(local, job, log_of(turns(job))))
    verdict = cluster.verify(job)
    assert verdict.replayed
    assert verdict.equal
    assert verdict.balanced


def test_a_log_that_was_tampered_with_is_found(local: Any) -> None:
    """A step twice, and one of another shard missing: as many commits as there were."""
    job = submitted(local, LOGGED)
    shards = turns(job)
    shards[9] = shards[8]
    verdict = elsewhere(local, checkpoint_of(local, job, log_of(shards))).verify(job)
    assert verdict.wrong
    assert not verdict.balanced
    assert not verdict.equal
    assert "fingerprint" in verdict.explanation
    short = checkpoint_of(local, job, log_of(turns(job)[:-1]))
    with pytest.raises(DataLoss, match="the replay log has"):
        elsewhere(local, short).verify(job)


@pytest.mark.parametrize("train", [{"asynchronous": {}}, {"stale": {"bound": 2}}])
def test_without_a_log_the_ledger_is_counted_all_the_same(
    local: Any, train: dict[str, Any]
) -> None:
    job = submitted(local, train)
    verdict = elsewhere(local, checkpoint_of(local, job)).verify(job)
    assert verdict.balanced
    assert (verdict.wrong, verdict.equal, verdict.compared) == (False, False, False)
    assert "was not written down" in verdict.not_compared
    assert f"train.{next(iter(train))}.replay_log: true" in verdict.not_compared
    assert verdict.ledger is not None
    assert verdict.ledger.exact_epochs == EPOCHS
    assert verdict.to_json()["local_sha256"] == ""
    steps = turns(job)[-1]
    behind = [steps] * SHARDS
    behind[0], behind[1] = steps - 1, steps + 1
    with pytest.raises(DataLoss, match="not one of 4 shards"):
        elsewhere(local, checkpoint_of(local, job, completed_steps=behind)).verify(job)
    other = checkpoint_of(local, job, examples=1)
    assert elsewhere(local, other).verify(job).wrong
    with pytest.raises(FailedPrecondition, match="was not written down"):
        replay_log_of(elsewhere(local, checkpoint_of(local, job)), job)


def test_steps_of_shards_that_do_not_fit_the_epochs_are_found(local: Any) -> None:
    job = submitted(local, {"asynchronous": {}})
    assert job.result is not None
    steps = [job.result.steps] * SHARDS
    steps[0], steps[1] = steps[0] - 3, steps[1] + 3
    moved = checkpoint_of(local, job, completed_steps=steps)
    verdict = elsewhere(local, moved).verify(job)
    assert verdict.ledger is not None
    assert verdict.ledger.epochs < EPOCHS, "an epoch that shard 0 has not been through"


def test_other_bits_of_a_job_that_promised_none_prove_nothing(local: Any) -> None:
    job = submitted(local, reproducibility={"tolerant": {}})
    stored = stored_of(local, job)
    stored.result.bit_identical = False
    assert local.verify(job).compared
    stored.result.parameters_sha256 = "0" * 64
    verdict = local.verify(job)
    assert verdict.balanced
    assert (verdict.wrong, verdict.equal, verdict.compared) == (False, False, False)
    assert "fingerprints" in verdict.not_compared
    stored.result.bit_identical = True
    assert local.verify(job).wrong


@pytest.fixture
def own_fingerprint() -> str:
    with one_blas_thread():
        return numeric_fingerprint.compute()


def computed_on(local: Any, monkeypatch: pytest.MonkeyPatch, fingerprint: str) -> Job:
    """A job whose workers had this fingerprint, as its model says."""
    written = model_files.model_json
    monkeypatch.setattr(
        model_files,
        "model_json",
        lambda description: written(replace(description, fingerprint=fingerprint)),
    )
    return submitted(local)


def test_other_bits_on_a_machine_with_another_fingerprint_prove_nothing(
    local: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = computed_on(local, monkeypatch, "f" * 64)
    assert local.verify(job).equal, "the same bits prove it wherever they come out"
    stored_of(local, job).result.parameters_sha256 = "0" * 64
    verdict = local.verify(job)
    assert verdict.balanced
    assert (verdict.wrong, verdict.equal, verdict.compared) == (False, False, False)
    assert "another numeric fingerprint" in verdict.not_compared


def test_other_bits_on_a_machine_with_the_same_fingerprint_are_wrong(
    local: Any, monkeypatch: pytest.MonkeyPatch, own_fingerprint: str
) -> None:
    job = computed_on(local, monkeypatch, own_fingerprint)
    stored_of(local, job).result.parameters_sha256 = "0" * 64
    verdict = local.verify(job)
    assert (verdict.wrong, verdict.compared) == (True, True)
    assert "has the numeric fingerprint of the workers" in verdict.explanation


@pytest.mark.parametrize("deleted", [False, True])
def test_other_bits_are_wrong_where_nobody_knows_the_fingerprint(
    local: Any, monkeypatch: pytest.MonkeyPatch, deleted: bool
) -> None:
    job = computed_on(local, monkeypatch, "f" * 64 if deleted else "")
    if deleted:
        local.models.delete("toy")
    stored_of(local, job).result.parameters_sha256 = "0" * 64
    verdict = local.verify(job)
    assert (verdict.wrong, verdict.compared) == (True, True)
    assert "another numeric fingerprint" in verdict.explanation


def test_which_contributions_came_too_late_is_not_known(local: Any) -> None:
    tolerant = {"reproducibility": {"tolerant": {}}}
    job = submitted(local, {"synchronous": {"backup_shards": 1}}, **tolerant)
    assert local.verify(job).equal
    stored = stored_of(local, job)
    stored.result.examples_lost = 16
    stored.progress.examples -= 16
    verdict = local.verify(job)
    assert verdict.balanced
    assert "backup_shards" in verdict.not_compared
    assert verdict.ledger is not None
    assert (verdict.ledger.used, verdict.ledger.left_out) == (EPOCHS * ROWS - 16, 16)


def without(
    local: Any, job: Job, *steps: tuple[int, ...], until_step: int | None = None
) -> LeftOutLog:
    """Let the job have left these shards out, and write down what it would have come to."""
    log = LeftOutLog()
    for shards in steps:
        log.add(shards)
    spec = job.message.spec
    dataset = local.data.get(spec.data.name)
    plan = job_plan(spec, dataset, job.id)
    manifest = DatasetManifest.from_json(local.backend.get_blob(plan.manifest_digest))
    fetch = local.backend._blob_path
    trained = train_in_process(plan, manifest, fetch, left_out=log)
    kept = train_in_process(plan, manifest, fetch, left_out=log, until_step=until_step)
    stored = stored_of(local, job)
    stored.result.parameters_sha256 = kept.parameters_sha256
    stored.result.bit_identical = False
    stored.result.examples_lost = sum(expected_of_shard(plan, *each) for each in log.contributions)
    stored.progress.examples = trained.examples
    return log


def test_shards_that_came_too_late_are_left_out_again(local: Any) -> None:
    tolerant = {"reproducibility": {"tolerant": {}}}
    job = submitted(local, {"synchronous": {"backup_shards": 2}}, **tolerant)
    assert job.result is not None
    plain, steps = job.result.parameters_sha256, job.result.steps
    late = [(step % SHARDS,) if step % 2 else () for step in range(steps)]
    log = without(local, job, *late)
    job = local.get(job.id)
    verdict = elsewhere(local, checkpoint_of(local, job, log)).verify(job.id)
    assert verdict.equal
    assert verdict.local_sha256 != plain
    assert verdict.ledger is not None
    assert verdict.ledger.problems == ()
    named = [(each.shard, each.step - 1) for each in verdict.ledger.named]
    assert sorted(named) == sorted(log.contributions)
    assert verdict.ledger.exact_epochs == 0
    others = LeftOutLog()
    for shards in late:
        others.add([(shard + 1) % SHARDS for shard in shards])
    moved = elsewhere(local, checkpoint_of(local, job, others)).verify(job.id)
    assert moved.wrong
    assert moved.compared
    assert not moved.equal
    none = LeftOutLog()
    for _ in late:
        none.add(())
    assert not elsewhere(local, checkpoint_of(local, job, none)).verify(job.id).balanced


def test_what_came_too_late_after_the_best_step_is_named_as_well(local: Any) -> None:
    """Where a clock ended the job, nothing is computed beyond the step that was kept."""
    tolerant = {"reproducibility": {"tolerant": {}}}
    job = submitted(local, {"synchronous": {"backup_shards": 1}}, **tolerant)
    assert job.result is not None
    log = without(local, job, *[(2,)] * job.result.steps, until_step=3)
    stored = stored_of(local, job)
    stored.spec.train.stop.wall_time.nanos = 1
    stored.result.best.step = 3
    job = local.get(job.id)
    verdict = elsewhere(local, checkpoint_of(local, job, log)).verify(job.id)
    assert verdict.equal
    assert verdict.steps == 3
    assert verdict.ledger is not None
    assert verdict.ledger.problems == ()
    assert {(each.shard, each.step - 1) for each in verdict.ledger.named} == log.contributions


def test_the_last_checkpoint_may_be_gone_where_all_shards_commit_together(local: Any) -> None:
    verdict = elsewhere(local).verify(submitted(local))
    assert verdict.equal
    assert verdict.balanced
    with pytest.raises(NotFound, match="not kept any more"):
        elsewhere(local).verify(submitted(local, LOGGED))


def test_without_its_data_set_a_job_is_not_verified(local: Any) -> None:
    job = submitted(local)
    local.data.delete("toy", force=True)
    with pytest.raises(FailedPrecondition, match=f"toy@1 is deleted, which job {job.id}") as caught:
        local.verify(job)
    assert caught.value.reason == "DATASET_DELETED"


def test_without_the_model_that_it_started_from_a_job_is_only_counted(local: Any) -> None:
    submitted(local)
    job = submitted(local, {"start": {"model": "toy"}})
    assert local.verify(job).equal
    local.models.delete("toy@1", force=True)
    verdict = local.verify(job)
    assert verdict.balanced
    assert verdict.not_compared == "model toy@1 is deleted, from which it started"


def test_a_checkpoint_of_another_step_is_refused(local: Any) -> None:
    job = submitted(local)
    checkpoint = checkpoint_of(local, job)
    checkpoint.step -= 1
    with pytest.raises(DataLoss, match="its last checkpoint is of"):
        elsewhere(local, checkpoint).verify(job)
    checkpoint.step += 1
    checkpoint.root_state = "{}"
    with pytest.raises(DataLoss, match="how many examples"):
        elsewhere(local, checkpoint).verify(job)


class Told(Elsewhere):
    """A backend whose journal has these results of tasks."""

    results: tuple[TaskResult, ...] = ()

    def stream(self, method: Any, *arguments: Any, **more: Any) -> Any:
        if method is READ_TASK_RESULTS:
            return iter([ReadTaskResultsResponse(results=self.results)])
        return self._inner.stream(method, *arguments, **more)


def test_every_task_has_one_result(local: Any) -> None:
    work = "def run(x):\n    if x == 2:\n        raise ValueError(x)\n    return x\n"
    tasks = {
        "entrypoint": "work:run",
        "arguments": [{"x": each} for each in range(4)],
        "attempts": 1,
        "on_failure": {"go_on": {}},
    }
    job = local.submit({"name": "numbers", "tasks": tasks, "code": {"files": {"work.py": work}}})
    job.wait(60)
    verdict = local.verify(job)
    assert verdict.tasks == TaskLedger(tasks=4, done=3, given_up=(2,))
    assert (verdict.balanced, verdict.wrong, verdict.compared) == (True, False, False)
    assert verdict.to_json()["tasks"]["done"] == 3
    backend = Told(local.backend)
    backend.results = tuple(TaskResult(task=each) for each in (0, 1, 1, 3, 9))
    verdict = Cluster(backend).verify(job)
    assert verdict.tasks == TaskLedger(tasks=4, done=4, doubled=(1, 9), missing=(2,))
    assert verdict.wrong
