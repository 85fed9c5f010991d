"""Independent tasks have one result each, whoever is killed while they run."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from phalanx.sdk.job import Job
from phalanx.sdk.methods import READ_JOURNAL
from phalanx.sdk.verdict import TaskLedger
from phalanx.tasks import journal_stream
from phalanx.testing.arena import GUARD_S, Arena, arena, wait_until
from phalanx.v1.storage_service_pb2 import ReadJournalRequest
from phalanx.v1.task_service_pb2 import TaskRecord

pytestmark = pytest.mark.slow

TASKS = 300
CODE = """
import os
import time
from pathlib import Path

GATE = Path(os.environ["PHALANX_TEST_GATE"])


def square(x):
    mark = GATE / f"entered-{os.getpid()}"
    while (GATE / "hold").exists() and not (GATE / f"may-end-{x}").exists():
        mark.touch()
        time.sleep(0.002)
    mark.unlink(missing_ok=True)
    time.sleep(0.02)
    return {"square": x * x}
"""


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    with arena(tmp_path_factory.mktemp("gate"), 3) as ring:
        yield ring


def submit(ring: Arena) -> Job:
    document: dict[str, Any] = {
        "name": "squares",
        "code": {"files": {"squares.py": CODE}},
        "tasks": {
            "entrypoint": "squares:square",
            "arguments": [{"x": number} for number in range(TASKS)],
        },
    }
    return ring.submit(document)


@pytest.fixture(autouse=True)
def all_wait(ring: Arena) -> None:
    """Tasks of a new job wait until some are let go on."""
    for each in ring.gate.folder.glob("may-end-*"):
        each.unlink()


def at_task(ring: Arena, job: Job, done: int) -> None:
    """Let the first tasks go on, and wait until they have ended; those that follow are held."""
    for number in range(done):
        (ring.gate.folder / f"may-end-{number}").touch()
    ring.at_step(job, done)


def records_of(ring: Arena, job: Job) -> list[TaskRecord]:
    request = ReadJournalRequest(stream=journal_stream(job.id))
    return [
        TaskRecord.FromString(record.payload)
        for page in ring.cluster.backend.stream(READ_JOURNAL, request)
        for record in page.records
    ]


def terms_begun(ring: Arena, job: Job) -> int:
    """How many owners the tasks had so far."""
    return sum(record.began for record in records_of(ring, job))


def each_once(ring: Arena, job: Job) -> list[TaskRecord]:
    """Every task has its result, and the journal holds it once."""
    result = job.wait(timeout_s=GUARD_S)
    assert result.steps == TASKS
    assert result.metrics["tasks/failed_tries"] == 0, "a death burned the budget of a task"
    values = {each.task: each.value for each in job.results()}
    assert values == {number: {"square": number * number} for number in range(TASKS)}
    records = records_of(ring, job)
    counted = Counter(each.task for record in records for each in record.results)
    assert counted == dict.fromkeys(range(TASKS), 1)
    assert ring.cluster.verify(job).tasks == TaskLedger(tasks=TASKS, done=TASKS)
    return records


def test_workers_control_storage_and_the_owner_of_the_tasks_killed_while_tasks_run(
    ring: Arena,
) -> None:
    job = submit(ring)
    owners = 1
    for done, victim in ((5, "worker"), (30, "control-1"), (60, "aggregator-1"), (90, "both")):
        at_task(ring, job, done)
        caught = ring.caught_in_a_leaf(job)
        victims = [caught[0]] if victim == "worker" else [victim]
        if victim == "both":
            victims = [caught[-1], "aggregator-1"]
        for member in victims:
            ring.signal(member)
        owners += "aggregator-1" in victims
        wait_until(lambda: terms_begun(ring, job) == owners, "the next owner of the tasks")  # noqa: B023
    ring.gate.release()
    records = each_once(ring, job)
    assert owners == terms_begun(ring, job) == 3
    attempts = [each.attempt for record in records for each in record.results]
    assert len({attempt >> 40 for attempt in attempts}) > 1


def test_storage_killed_while_tasks_run(ring: Arena) -> None:
    job = submit(ring)
    at_task(ring, job, 10)
    ring.caught_in_a_leaf(job)
    ring.signal("storage")
    ring.gate.release()
    each_once(ring, job)


def test_paused_and_resumed_between_two_tasks(ring: Arena) -> None:
    job = submit(ring)
    at_task(ring, job, 10)
    job.pause()
    ring.gate.release()
    wait_until(lambda: job.refresh().state == "PAUSED", "the pause")
    paused_at = job.message.progress.step
    assert 0 < paused_at < TASKS
    assert len(job.results()) == paused_at
    job.resume()
    each_once(ring, job)
