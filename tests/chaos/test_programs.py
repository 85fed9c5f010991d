"""A program leaves the same bytes, whoever is killed while its tasks run."""

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest

import phalanx
from phalanx.errors import PermissionDenied
from phalanx.keys import tokens
from phalanx.keys.caller import Role
from phalanx.local.keys import TOKENS_FILE
from phalanx.sdk.job import Job
from phalanx.sdk.methods import READ_JOURNAL, READ_TASK_RESULTS
from phalanx.sweeps.steps import steps_of
from phalanx.tasks import journal_stream, kept_holder
from phalanx.testing.arena import (
    GUARD_S,
    Arena,
    TooLate,
    arena,
    gated_job,
    in_time,
    not_over,
    pause,
    wait_until,
)
from phalanx.v1.job_service_pb2 import ReadTaskResultsRequest
from phalanx.v1.storage_service_pb2 import ListPinsRequest, ReadJournalRequest
from phalanx.v1.storage_service_pb2_grpc import StorageServiceStub
from phalanx.v1.task_service_pb2 import TaskRecord, TaskResult

pytestmark = [pytest.mark.slow, pytest.mark.same_bits]

FOREST: dict[str, Any] = {
    "name": "forest",
    "data": {"name": "wide", "shards": 4},
    "forest": {"trees": 40, "tree": {"max_features": "all"}},
    "seed": 11,
}
CASCADE: dict[str, Any] = {
    "name": "cascade",
    "data": {"name": "wide", "shards": 12},
    "cascade": {"c": 1, "gamma": 0.02, "passes": 3},
}
SWEEP: dict[str, Any] = {
    "name": "sweep",
    "data": {"name": "wide"},
    "sweep": {
        "base": {"cascade": {"c": 1, "gamma": 0.02}},
        "grid": {"cascade.c": [0.1, 1, 10], "cascade.gamma": [0.01, 0.02]},
        "folds": 3,
    },
}


ASHA: dict[str, Any] = {
    "name": "asha",
    "data": {"name": "wide"},
    "sweep": {
        "base": {
            "train": {
                "model": {"mlp": {"hidden": [32]}},
                "optimizer": {"sgd": {}},
                "batch_size": 128,
                "stop": {"steps": 180},
            }
        },
        "grid": {"train.optimizer.sgd.learning_rate": [each / 50 for each in range(1, 10)]},
        "folds": 2,
        "asha": {"min_steps": 20},
    },
    "seed": 4,
}


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    with arena(tmp_path_factory.mktemp("gate"), 3) as ring:
        add_wide(ring.cluster)
        yield ring


@pytest.fixture(scope="module")
def alone() -> Iterator[phalanx.Cluster]:
    with phalanx.LocalCluster(workers=0) as alone:
        add_wide(alone)
        yield alone


@pytest.fixture(scope="module")
def undisturbed(alone: phalanx.Cluster) -> str:
    return alone.submit(FOREST).wait(timeout_s=GUARD_S).parameters_sha256


def add_wide(cluster: phalanx.Cluster) -> None:
    """Rows of which a tree takes some tenths of a second."""
    generator = np.random.Generator(np.random.Philox(5))
    features = generator.normal(size=(3000, 40)).astype(np.float32)
    cluster.data.add("wide", features, (features[:, :5].sum(axis=1) > 0).astype(int))


def records_of(ring: Arena, job: Job) -> list[TaskRecord]:
    request = ReadJournalRequest(stream=journal_stream(job.id))
    return [
        TaskRecord.FromString(record.payload)
        for page in ring.cluster.backend.stream(READ_JOURNAL, request)
        for record in page.records
    ]


def done_by(ring: Arena, job: Job) -> list[str]:
    """Who has done the tasks that are done, in order of time."""
    return [each.worker_id for each in results_of(ring, job)]


def results_of(ring: Arena, job: Job) -> list[TaskResult]:
    """What is known of the tasks that are done."""
    request = ReadTaskResultsRequest(job_id=job.id)
    pages = ring.cluster.backend.stream(READ_TASK_RESULTS, request)
    return [each for page in pages for each in page.results]


def leaves_of(ring: Arena, worker_id: str) -> list[psutil.Process]:
    """The processes below a worker: those that run tasks, and those that start them."""
    return psutil.Process(ring.cluster.process(worker_id).pid).children(recursive=True)


def held(ring: Arena, document: dict[str, Any]) -> tuple[Job, str]:
    """Submit a job and stop the leaf processes of a worker that has work of it; the job and the id
    of that worker.

    It has done a task, and those that follow waited for it; while others go on it has one by the
    time that they have done some more, and cannot end it.
    """

    def attempt() -> tuple[Job, str]:
        ring.workers_ready()
        job = ring.cluster.submit(document)
        victim = str(wait_until(lambda: next(iter(done_by(ring, job)), ""), "the first task"))
        leaves = leaves_of(ring, victim)
        for process in leaves:
            process.send_signal(signal.SIGSTOP)
        before = len(done_by(ring, job))

        def others_went_on() -> bool:
            more = sum(each != victim for each in done_by(ring, job)[before:])
            return more >= 2 or job.refresh().done

        wait_until(others_went_on, "tasks of others")
        try:
            not_over(job.refresh())
        except TooLate:
            for process in leaves:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGCONT)
            raise
        return job, victim

    return in_time(attempt)


def kill(ring: Arena, victim: str) -> None:
    """Kill a worker and its leaf processes, which are stopped and would not see it."""
    left = leaves_of(ring, victim)
    ring.signal(victim)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def test_a_worker_killed_with_a_tree_half_grown(ring: Arena, undisturbed: str) -> None:
    job, victim = held(ring, FOREST)
    kill(ring, victim)
    result = job.wait(timeout_s=GUARD_S)
    assert result.parameters_sha256 == undisturbed
    assert result.metrics["tasks/failed_tries"] == 0
    attempts = [each.attempt for each in results_of(ring, job)]
    assert len(attempts) == result.steps
    # Attempts are numbered as they are given: more than one of a task was.
    assert max(attempts) - min(attempts) >= result.steps


def test_control_the_owner_of_the_tasks_and_storage_killed(ring: Arena, undisturbed: str) -> None:

    def struck() -> Job:
        ring.workers_ready()
        job = ring.cluster.submit(FOREST)
        for done, victim in ((3, "control-1"), (8, "aggregator-1"), (14, "storage")):
            ring.at_step(job, done)
            ring.signal(victim)
        return job

    job = in_time(struck)
    assert job.wait(timeout_s=GUARD_S).parameters_sha256 == undisturbed
    terms = [record.term for record in records_of(ring, job) if record.began]
    assert len(terms) == 2, "the tasks had no second owner"


def test_paused_between_two_tasks_and_resumed(ring: Arena, undisturbed: str) -> None:

    def paused() -> Job:
        ring.workers_ready()
        job = ring.cluster.submit(FOREST)
        ring.at_step(job, 5)
        pause(job)
        return job

    job = in_time(paused)
    assert 5 <= job.message.progress.step < job.message.progress.total_steps
    job.resume()
    assert job.wait(timeout_s=GUARD_S).parameters_sha256 == undisturbed


def test_programs_in_a_cluster_with_keys(tmp_path: Path, undisturbed: str) -> None:
    """A worker dies, and whoever may not bring code cannot have that of a model run either."""
    with arena(tmp_path, 2, secure=True) as ring:
        add_wide(ring.cluster)
        job, victim = held(ring, FOREST)
        ring.signal(victim)
        assert job.wait(timeout_s=GUARD_S).parameters_sha256 == undisturbed
        ring.gate.release()
        coded = ring.cluster.submit(gated_job(steps=2)).wait(timeout_s=GUARD_S).model
        score = {"name": "score", "data": {"name": "blobs"}, "evaluate": {"model": coded}}
        keys = ring.cluster.state_dir / "keys"
        token = tokens.create(keys / TOKENS_FILE, "ann", Role.SUBMITTER)
        with phalanx.connect(ring.cluster.address, ca=keys / "ca.pem", token=token) as ann:
            with pytest.raises(PermissionDenied) as refused:
                ann.submit(score)
            assert refused.value.reason == "CODE_NOT_ALLOWED"
            other = {"name": "score", "data": {"name": "wide"}, "evaluate": {"model": "forest"}}
            assert "train/accuracy" in ann.submit(other).wait(timeout_s=GUARD_S).metrics
        found = ring.cluster.submit(score).wait(timeout_s=GUARD_S).metrics
        assert "test/accuracy" in found


def test_a_worker_killed_with_a_part_of_a_cascade_half_solved(
    ring: Arena, alone: phalanx.Cluster
) -> None:
    expected = alone.submit(CASCADE).wait(timeout_s=GUARD_S)
    job, victim = held(ring, CASCADE)
    kill(ring, victim)
    result = job.wait(timeout_s=GUARD_S)
    assert result.parameters_sha256 == expected.parameters_sha256
    assert result.metrics["cascade/dual"] == expected.metrics["cascade/dual"]


def tables_of(result: phalanx.Result) -> dict[str, str]:
    return {each.name: each.digest for each in result.files if not each.name.endswith(".png")}


def test_two_sweeps_whose_trials_go_on_while_one_service_after_another_is_killed(
    ring: Arena, alone: phalanx.Cluster
) -> None:
    halving = {**ASHA["sweep"], "halving": {"min_steps": 20}}
    del halving["asha"]
    sweeps = [ASHA, {**ASHA, "name": "halving", "sweep": halving}]
    expected = [alone.submit(each).wait(timeout_s=GUARD_S) for each in sweeps]

    def struck() -> list[Job]:
        ring.workers_ready()
        jobs = [ring.cluster.submit(each) for each in sweeps]
        for done, victim in ((6, "aggregator-1"), (10, "control-1"), (14, "storage")):
            ring.at_step(jobs[0], done)
            ring.signal(victim)
        return jobs

    jobs = in_time(struck)
    for job, known in zip(jobs, expected, strict=True):
        result = job.wait(timeout_s=GUARD_S)
        assert tables_of(result) == tables_of(known)
        assert result.parameters_sha256 == known.parameters_sha256
        assert any(each.HasField("kept") for each in results_of(ring, job))
    with grpc.insecure_channel(ring.cluster.process("storage").address) as channel:
        stub = StorageServiceStub(channel)

        def holders(first: str) -> list[str]:
            request = ListPinsRequest(after_holder=first)
            listed = stub.ListPins(request, timeout=GUARD_S, wait_for_ready=True)
            return [each for each in listed.holders if each.startswith(first)]

        for job in jobs:
            first = kept_holder(job.id, "")
            wait_until(lambda first=first: not holders(first), "the end of the pins")


@pytest.mark.parametrize("sweep", [SWEEP, ASHA], ids=["all", "asha"])
def test_a_worker_killed_with_a_trial_half_done(
    ring: Arena, alone: phalanx.Cluster, sweep: dict[str, Any]
) -> None:
    expected = alone.submit(sweep).wait(timeout_s=GUARD_S)
    job, victim = held(ring, sweep)
    kill(ring, victim)
    result = job.wait(timeout_s=GUARD_S)
    assert result.parameters_sha256 == expected.parameters_sha256
    assert tables_of(result) == tables_of(expected)
    assert sorted(tables_of(result)) == ["results.csv", "results.json"]
    if "asha" in sweep["sweep"]:
        steps = steps_of(job.message.spec)
        # Attempts are numbered as they are given: trials went on while others had yet to begin.
        given = {each.task: each.attempt for each in results_of(ring, job)}
        trials = [(steps[task].round, at) for task, at in given.items() if steps[task].passes]
        last = max(at for task, at in given.items() if steps[task].round == 0)
        assert min(at for number, at in trials if number) < last
        verdict = ring.cluster.verify(job)
        assert verdict.balanced, "a task that nobody ran was not passed over either"
        assert verdict.equal
