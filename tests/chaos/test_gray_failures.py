"""Workers that are neither dead nor well: stopped, or with a hanging leaf and good heartbeats."""

from pathlib import Path
from typing import Any

import psutil
import pytest

from phalanx.sdk.values import Event
from phalanx.testing.arena import (
    GUARD_S,
    Arena,
    arena,
    stopped,
    undisturbed_sha256_of,
    unhurried_job,
    wait_until,
)

pytestmark = [pytest.mark.slow, pytest.mark.same_bits]

LEAF_S = 0.005


def copied(ring: Arena, victim: str) -> list[Event]:
    return [event for event in ring.events("SPECULATION_STARTED") if event.worker_id == victim]


def test_a_stopped_worker_is_copied_long_before_its_lease_is_over(
    tmp_path: Path, long_job: dict[str, Any], long_sha256: str
) -> None:
    with arena(tmp_path, 3, leaf_s=LEAF_S) as ring:
        job = ring.submit(long_job)
        ring.caught_at(job, 10)
        victim = ring.caught_with_shards(job)
        with stopped(ring.cluster.process(victim).pid):
            ring.gate.release()
            wait_until(lambda: copied(ring, victim), "copies of what the stopped worker owes")
            wait_until(lambda: ring.events("WORKER_LOST"), "the lease to run out")
        ring.hosting(job, victim)
        result = job.wait(timeout_s=GUARD_S)
        lost = next(event for event in ring.events("WORKER_LOST") if event.worker_id == victim)
        # Behind the gate it may have been late before it was stopped, and have caught up.
        told = [each for each in copied(ring, victim) if each.incident_id == lost.incident_id]
        assert told, "its death belongs to the incident that began with the copies"
        first = told[0]
        points = [point for point in job.metric_messages() if point.name == "train/loss"]
        commits = [point.time.ToNanoseconds() / 1e9 for point in points]
        between = [at for at in commits if first.time.timestamp() < at < lost.time.timestamp()]
        assert between, "the others waited for the lease"
    assert result.parameters_sha256 == long_sha256
    assert (result.examples_lost, result.examples_doubled) == (0, 0)


def test_a_leaf_that_hangs_under_good_heartbeats_is_copied_and_moved(
    tmp_path: Path,
) -> None:
    """The gate stays open: who waits there for long looks slow, and may lose its shards for that,
    or has been set aside for some leases already."""
    document = unhurried_job(steps=400)
    with arena(tmp_path, 3, leaf_s=4 * LEAF_S, lease_s=5.0) as ring:
        ring.workers_ready()
        job = ring.cluster.submit(document)
        ring.at_step(job, 10)
        victim = next(each.worker_id for each in job.progress.workers if each.shards)
        children = psutil.Process(ring.cluster.process(victim).pid).children(recursive=True)
        (leaf,) = (
            child.pid for child in children if "leaf of process" in " ".join(child.cmdline())
        )
        with stopped(leaf):
            wait_until(lambda: copied(ring, victim), "copies of what the hanging leaf owes")
            wait_until(
                lambda: [
                    event
                    for event in ring.events("SHARDS_MOVED")
                    if event.details["cause"] == "hang"
                ],
                "the shards of the hanging worker to move",
            )
            ring.hurry()
            result = job.wait(timeout_s=GUARD_S)
        assert not ring.events("WORKER_LOST"), "its heartbeats never stopped"
    assert result.parameters_sha256 == undisturbed_sha256_of(document, tmp_path)
    assert (result.examples_lost, result.examples_doubled) == (0, 0)
