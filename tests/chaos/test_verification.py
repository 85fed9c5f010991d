"""Workers that lie: what they compute never counts, they are caught, and the bits stay."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from phalanx.sdk.job import Job
from phalanx.sdk.values import Event
from phalanx.testing.arena import (
    GUARD_S,
    Arena,
    arena,
    gated_job,
    stopped,
    undisturbed_sha256_of,
    wait_until,
)
from phalanx.v1.cluster_service_pb2 import Worker

pytestmark = pytest.mark.slow

LYING_MODEL = '''
"""The gated model; on workers that are told to, leaves lie about some shards, each in its way."""

import os
import zlib

import psutil
from gated import GATE, Gated

WORKERS = [os.getppid(), *(parent.pid for parent in psutil.Process().parents())]


class Lying(Gated):
    def loss_and_gradients(self, parameters, features, targets):
        loss, gradients = super().loss_and_gradients(parameters, features, targets)
        for pid in WORKERS:
            if (GATE / f"lies-{pid}").exists():
                number, of, lie = map(int, (GATE / f"lies-{pid}").read_text().split("/"))
                if zlib.crc32(features.tobytes()) % of == number:
                    gradients["w"][0, 0] *= 1 + lie * 1e-3
        return loss, gradients
'''
STEPS = 80
LIARS = ["worker-1", "worker-3", "worker-4"]


def lying_job(**train: Any) -> dict[str, Any]:
    job = gated_job(STEPS, **train)
    job["code"]["files"]["lying.py"] = LYING_MODEL
    job["train"]["model"]["custom"]["entrypoint"] = "lying:Lying"
    return job


def lie(ring: Arena, worker_id: str, about: str, lie: int = 1) -> None:
    """From now on a worker lies about every third leaf, say: those with a remainder of "0/3".

    Workers with the same lie say the same.
    """
    pid = ring.cluster.process(worker_id).pid
    path = ring.gate.folder / f"lies-{pid}"
    path.with_suffix(".new").write_text(f"{about}/{lie}")
    path.with_suffix(".new").rename(path)


def lie_in_turns(ring: Arena) -> None:
    """No two of the liars lie about the same leaf."""
    for number, worker_id in enumerate(LIARS):
        lie(ring, worker_id, f"{number}/3")


def begin_to_lie(ring: Arena, job: Job) -> None:
    """From the middle of a step on the liars lie, each in its turn."""
    ring.caught_at(job, 3)
    lie_in_turns(ring)
    ring.gate.release()


def be_honest(ring: Arena) -> None:
    for path in ring.gate.folder.glob("lies-*"):
        path.unlink()


def quarantined(ring: Arena) -> set[str]:
    state = Worker.STATE_QUARANTINED
    return {worker.id for worker in ring.cluster.workers() if worker.state == state}


def ready(ring: Arena) -> int:
    return sum(worker.state == Worker.STATE_READY for worker in ring.cluster.workers())


def start_again(ring: Arena, worker_ids: list[str]) -> None:
    """A new start of a worker is taken in again."""
    be_honest(ring)
    for worker_id in worker_ids:
        ring.signal(worker_id)
    wait_until(lambda: not quarantined(ring) and ready(ring) == 5, "all to be there again")


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    with arena(tmp_path_factory.mktemp("gate"), 5) as ring:
        yield ring


@pytest.fixture(scope="module")
def clean_sha256(tmp_path_factory: pytest.TempPathFactory) -> str:
    return undisturbed_sha256_of(lying_job(), tmp_path_factory.mktemp("gate"))


@pytest.fixture(autouse=True)
def gate(ring: Arena, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PHALANX_TEST_GATE", str(ring.gate.folder))
    yield
    ring.gate.release()
    be_honest(ring)


@pytest.mark.same_bits
def test_three_workers_that_lie(ring: Arena, clean_sha256: str) -> None:
    job = ring.submit(lying_job())
    begin_to_lie(ring, job)
    result = job.wait(timeout_s=GUARD_S)
    assert result.parameters_sha256 != clean_sha256, "the lies change nothing, so nothing is shown"
    be_honest(ring)

    job = ring.submit(lying_job(verification={"replicas": 3}))
    begin_to_lie(ring, job)
    result = job.wait(timeout_s=GUARD_S)
    assert result.parameters_sha256 == clean_sha256
    assert (result.steps, result.examples_lost, result.examples_doubled) == (STEPS, 0, 0)
    assert result.bit_identical
    wait_until(lambda: quarantined(ring) == {*LIARS}, "all three to be quarantined")
    events = ring.events("WORKER_QUARANTINED")
    assert sorted(event.worker_id for event in events) == LIARS, "each is told of once"
    for event in events:
        told = event.details
        assert event.job_id == job.id
        assert event.shard in range(11)
        assert event.step in range(3, STEPS)
        assert len(told["sha256"]) == len(told["majority_sha256"]) == 64
        assert told["sha256"] != told["majority_sha256"]
        assert event.worker_id not in told["agreed"].split(",")
    assert not any(worker.jobs for worker in ring.cluster.workers() if worker.id in LIARS)

    ring.signal("control-1")
    wait_until(lambda: ready(ring) == 2 and quarantined(ring) == {*LIARS}, "control to remember")
    start_again(ring, LIARS)


def caught_from_the_first(ring: Arena, job: Job, liars: list[str]) -> None:
    """Liars are caught by what they say of the job before they take part in it."""
    wait_until(lambda: quarantined(ring) == {*liars}, "the liars to be quarantined")
    events = wait_until(lambda: told_of(ring, job, len(liars)), "the event of each")
    assert sorted(event.worker_id for event in events) == liars
    for event in events:
        told = event.details
        assert (event.shard, event.step) == (0, 0)
        assert len(told["sha256"]) == len(told["majority_sha256"]) == 64
        assert told["sha256"] != told["majority_sha256"]
        assert not {*liars} & {*told["agreed"].split(",")}


def told_of(ring: Arena, job: Job, count: int) -> list[Event]:
    """So many quarantines of a job; empty: not yet."""
    every = ring.events("WORKER_QUARANTINED")
    events = [each for each in every if each.job_id == job.id]
    return events if len(events) >= count else []


@pytest.mark.same_bits
def test_three_workers_that_lie_from_the_first_description_on(
    ring: Arena, clean_sha256: str
) -> None:
    """Most of the workers, and the one that is asked first; each says something else."""
    for number, worker_id in enumerate(LIARS):
        lie(ring, worker_id, "0/1", number + 1)
    job = ring.submit(lying_job(verification={"replicas": 3}))
    ring.caught_at(job, 1)
    caught_from_the_first(ring, job, LIARS)
    ring.gate.release()
    result = job.wait(timeout_s=GUARD_S)
    assert result.parameters_sha256 == clean_sha256
    assert (result.steps, result.examples_lost, result.examples_doubled) == (STEPS, 0, 0)
    start_again(ring, LIARS)


@pytest.mark.same_bits
def test_two_of_five_that_tell_the_same_lie_from_the_first_on(
    ring: Arena, clean_sha256: str
) -> None:
    liars = ["worker-1", "worker-2"]
    for worker_id in liars:
        lie(ring, worker_id, "0/1")
    job = ring.submit(lying_job(verification={"replicas": 5}))
    ring.signal("control-1")  # whoever leads next asks anew
    ring.caught_at(job, 1)
    caught_from_the_first(ring, job, liars)
    ring.gate.release()
    result = job.wait(timeout_s=GUARD_S)
    assert result.parameters_sha256 == clean_sha256
    start_again(ring, liars)


def test_an_audit_catches_a_liar(ring: Arena) -> None:
    before = len(ring.events("WORKER_QUARANTINED"))
    job = ring.submit(lying_job(verification={"audit_fraction": 0.3}))
    ring.caught_at(job, 3)
    lie(ring, "worker-2", "0/1")
    ring.gate.release()
    job.wait(timeout_s=GUARD_S)
    wait_until(lambda: quarantined(ring) == {"worker-2"}, "the liar to be caught")
    [event] = ring.events("WORKER_QUARANTINED")[before:]
    assert (event.job_id, event.worker_id) == (job.id, "worker-2")
    start_again(ring, ["worker-2"])


@pytest.mark.same_bits
def test_worker_and_aggregator_killed_amid_copies(ring: Arena, clean_sha256: str) -> None:
    job = ring.submit(lying_job(verification={"replicas": 3}))
    for step, victims in ((4, 1), (15, 0), (25, 2)):
        caught = ring.caught_at(job, step)
        for member in caught[:victims] or ["aggregator-1"]:
            ring.signal(member)
    ring.gate.release()
    result = job.wait(timeout_s=GUARD_S)
    assert result.parameters_sha256 == clean_sha256
    assert (result.steps, result.examples_lost, result.examples_doubled) == (STEPS, 0, 0)
    assert not quarantined(ring)


@pytest.mark.same_bits
def test_without_a_second_worker_the_job_waits_and_says_so(ring: Arena, clean_sha256: str) -> None:
    job = ring.submit(lying_job(verification={"replicas": 3}))
    ring.caught_at(job, 5)
    with contextlib.ExitStack() as stack:
        for number in range(2, 6):
            stack.enter_context(stopped(ring.cluster.process(f"worker-{number}").pid))
        ring.gate.release()
        wait_until(lambda: job.refresh().reason == "WAITING_FOR_VERIFIERS", "it to say so")
        # Jobs tell their reason at once, events are shown when they are stored.
        waits = wait_until(
            lambda: [
                each
                for each in ring.events("JOB_WAITING")
                if each.details["reason"] == "WAITING_FOR_VERIFIERS"
            ],
            "the event of it",
        )
        assert "2 workers have to agree" in waits[-1].message
        assert job.progress.step < STEPS
    result = job.wait(timeout_s=GUARD_S)
    assert result.parameters_sha256 == clean_sha256
    assert not quarantined(ring)
