"""Storage stays away while a job trains: steps go on, and what has to be durable waits in order.

The job's leaves are held in its second step, whose data is there, until storage is away and that
is known. It has no evaluation: the rows for it would be fetched when they are needed first.
"""

import contextlib
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import chain, pairwise
from pathlib import Path

import grpc
import pytest

import phalanx
from phalanx.clients.storage import SyncStorageClient
from phalanx.errors import PhalanxError, Unavailable
from phalanx.rpc.status import from_rpc_error
from phalanx.sdk.job_files import as_document
from phalanx.sdk.values import Event
from phalanx.testing.arena import (
    GUARD_S,
    Arena,
    arena,
    blobs,
    held_job,
    stopped,
    undisturbed_sha256_of,
    wait_until,
)
from phalanx.v1.cluster_service_pb2 import Worker
from phalanx.v1.coordination_service_pb2 import MetricPoints
from phalanx.v1.job_pb2 import Event as JournalledEvent
from phalanx.v1.job_service_pb2 import SubmitJobRequest
from phalanx.v1.job_service_pb2_grpc import JobServiceStub

pytestmark = [
    pytest.mark.slow,
    pytest.mark.same_bits,
    # For longer than a lease of control, which is asked for its workers again and again.
    pytest.mark.filterwarnings("ignore::phalanx.errors.IncompleteWarning"),
]

STEPS, EVERY = 60, 10
JOB = held_job(steps=STEPS, checkpoints={"every_steps": EVERY, "keep": STEPS})
JOB["data"] = {"name": "all-blobs", "shards": 11}
del JOB["train"]["evaluation"]
CALL_S = 2.0
"""Deadline of one call to control, which may not have noticed yet that storage is away."""


def add_data(cluster: phalanx.Cluster) -> None:
    cluster.data.add("all-blobs", *blobs())


@contextlib.contextmanager
def stopped_storage(ring: Arena) -> Iterator[None]:
    """Its sockets stay open and nothing comes out of them."""
    with stopped(ring.cluster.process("storage").pid):
        yield


@contextlib.contextmanager
def dead_storage(ring: Arena) -> Iterator[None]:
    """It is killed and cannot be started again: its folder is not there any more, or its database
    takes nobody in."""
    ring.signal("storage", signal.SIGSTOP)
    with ring.kept.shut():
        ring.signal("storage")
        yield


AWAY: dict[str, Callable[[Arena], AbstractContextManager[None]]] = {
    "stopped": stopped_storage,
    "dead": dead_storage,
}


def refusal(ring: Arena, request: SubmitJobRequest) -> PhalanxError | None:
    """What a submission answers; None while control may still be waiting for storage itself."""
    with grpc.insecure_channel(ring.cluster.process("control-1").address) as channel:
        try:
            JobServiceStub(channel).SubmitJob(request, timeout=CALL_S)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                return None
            return from_rpc_error(error)
    raise AssertionError("a submission was acknowledged without storage")


def is_lost(ring: Arena, pid: int) -> bool:
    """Whether control knows that a process of a worker is not there any more."""
    return all(
        worker.pid != pid or worker.state == Worker.STATE_LOST for worker in ring.cluster.workers()
    )


def known_jobs(ring: Arena) -> list[str]:
    """The jobs that control lists without knowing whether it knows all."""
    found = ring.cluster.jobs()
    return [each.id for each in found] if found.incomplete else []


def outage_around(events: list[Event], event: Event) -> list[Event]:
    """The story of storage in the midst of which an event is."""
    before = [each for each in events if each.sequence < event.sequence]
    (*_, last) = (each for each in before if each.type == "STORAGE_UNAVAILABLE")
    return [each for each in events if each.incident_id == last.incident_id]


def check_events(ring: Arena, victim: str, how: str) -> None:
    """The loss of a worker and what followed was written after it was known, in order."""

    def told() -> tuple[list[Event], Event, list[Event]]:
        events = list(ring.cluster.events())
        lost = next(e for e in events if e.type == "WORKER_LOST" and e.worker_id == victim)
        return events, lost, outage_around(events, lost)

    wait_until(lambda: ring.events("WORKER_LOST"), "what waited to be written")
    wait_until(lambda: "restored_after_s" in told()[2][-1].details, "the end of the outage")
    events, lost, outage = told()
    assert [each.sequence for each in events] == list(range(1, len(events) + 1))
    assert all(one.time <= other.time for one, other in pairwise(events))
    recovery = [each for each in events if each.incident_id == lost.incident_id]
    phases = ("WORKER_LOST", "SHARDS_MOVED", "RECOVERED")
    assert tuple(each.type for each in recovery if each.type in phases) == phases
    assert {each.type for each in outage} == {"STORAGE_UNAVAILABLE", "STORAGE_RESTORED"}
    assert outage[0].sequence < recovery[0].sequence < recovery[-1].sequence < outage[-1].sequence
    if how == "dead":
        waits = [each.type for each in outage if each.details.get("member") == "aggregator-1"]
        assert waits == ["STORAGE_UNAVAILABLE", "STORAGE_RESTORED"]
    with SyncStorageClient(ring.cluster.process("storage").address) as storage:
        journal = storage.read_journal("events")
    assert [JournalledEvent.FromString(each.payload).type for each in journal[: len(events)]] == [
        each.type for each in events
    ]


def check_streams(ring: Arena, job: phalanx.Job) -> None:
    """The checkpoints that were due, one at a time, and the loss of each step once."""
    with SyncStorageClient(ring.cluster.process("storage").address) as storage:

        def steps() -> list[int]:
            records = storage.read_journal(f"metrics/{job.id}")
            read = (MetricPoints.FromString(each.payload).points for each in records)
            return [each.step for each in chain(*read) if each.name == "train/loss"]

        manifests = storage.list_checkpoints(job.id)[::-1]
        wait_until(lambda: len(steps()) >= STEPS, "the losses to be written")
        assert steps() == list(range(1, STEPS + 1))
    assert [(each.step, each.final) for each in manifests] == [(EVERY, False), (STEPS, True)]
    assert manifests[0].create_unix_nanos <= manifests[1].create_unix_nanos
    committed = [each.step for each in ring.events("CHECKPOINT_COMMITTED")]
    assert committed == sorted(committed)


@pytest.fixture(scope="module")
def sha256(tmp_path_factory: pytest.TempPathFactory) -> str:
    return undisturbed_sha256_of(JOB, tmp_path_factory.mktemp("gate"), add_data)


@pytest.mark.parametrize("how", AWAY)
def test_steps_go_on_and_what_waits_is_written_in_order(
    tmp_path: Path, sha256: str, how: str
) -> None:
    another = SubmitJobRequest(spec=as_document(JOB).spec, request_id="while-it-was-away")
    with arena(tmp_path, 2) as ring:
        add_data(ring.cluster)
        # Or one of them might need its first data when storage is away.
        job = ring.submit_held(JOB, workers=2)
        victim = "worker-1"
        with AWAY[how](ring):
            error = wait_until(lambda: refusal(ring, another), "a submission to be refused")
            assert isinstance(error, Unavailable)
            assert error.retry_after_s
            pid = ring.cluster.process(victim).pid
            ring.signal(victim)
            wait_until(lambda: is_lost(ring, pid), "the death of a worker to be seen")
            ring.gate.release()
            wait_until(lambda: job.refresh().progress.step == STEPS, "all steps to be committed")
            if how == "dead":  # an upload to storage that is stopped goes on when that does
                log = Path(ring.cluster.process("aggregator-1").log)
                wait_until(lambda: "checkpoint_waits" in log.read_text(), "a checkpoint to wait")
            assert (job.state, job.progress.checkpoint_step) == ("RUNNING", 0)
            known = wait_until(lambda: known_jobs(ring), "a list that may not be whole")
            assert known == [job.id], "and shows what there is"
        result = job.wait(timeout_s=GUARD_S)
        assert result.parameters_sha256 == sha256
        assert (result.examples_lost, result.examples_doubled) == (0, 0)
        assert (result.steps, result.bit_identical) == (STEPS, True)
        check_streams(ring, job)
        check_events(ring, victim, how)
        again = ring.cluster.submit(JOB, request_id=another.request_id)
        found = ring.cluster.jobs()
        assert ([each.id for each in found], found.incomplete) == ([again.id, job.id], "")
        assert again.wait(timeout_s=GUARD_S).parameters_sha256 == sha256
