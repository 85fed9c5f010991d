"""A job that goes on from a checkpoint of another one."""

from __future__ import annotations

from typing import Any

import pytest

from coordinator.control.continuing import keep_cut_and_bits
from phalanx.v1 import coordination_service_pb2 as pb
from phalanx.v1 import storage_service_pb2 as storage_pb
from phalanx.v1.control_journal_pb2 import JobSubmitted
from phalanx.v1.job_pb2 import Failure


def manifest(job_id: str, step: int, ranges: int = 1) -> storage_pb.CheckpointManifest:
    return storage_pb.CheckpointManifest(
        job_id=job_id, step=step, range_count=ranges, manifest_sha256=f"{step:064x}"
    )


@pytest.fixture
def continued(cluster: Any) -> Any:
    """A cluster with aggregators of two kinds, on the rarer of which the other job ended."""
    for name, fingerprint in (("a1", "f"), ("a2", "f"), ("a3", "g")):
        cluster.aggregator(name, fingerprint=fingerprint)
    for name in ("w1", "w2", "w3"):
        cluster.worker(name)

    def change(submitted: JobSubmitted) -> None:
        submitted.continued.checkpoint.CopyFrom(manifest("job-0", 35))
        submitted.continued.aggregator_fingerprint = "g"

    cluster.submit(change=change)
    assert cluster.state() == "RUNNING"
    return cluster


def restores(cluster: Any, aggregator: str) -> list[tuple[str, int]]:
    told = cluster.told(aggregator, "assign_ranges")
    return [(each.restore.job_id, each.restore.step) for each in told]


def test_it_begins_with_that_checkpoint_on_aggregators_with_the_same_bits(continued: Any) -> None:
    assert restores(continued, "a3") == [("job-0", 35)]
    started = next(event for event in continued.events if event.type == "JOB_STARTED")
    assert "from the checkpoint at step 35" in started.message


def test_its_own_checkpoint_is_taken_once_there_is_one(continued: Any) -> None:
    continued.checkpoints["job-1"] = [manifest("job-1", 40)]
    continued.kill("a3")
    continued.aggregator("a3", fingerprint="g", incarnation="a3-2")
    assert restores(continued, "a3") == [("job-1", 40)]


def test_without_one_of_its_own_it_begins_there_again(continued: Any) -> None:
    continued.kill("a3")
    continued.aggregator("a3", fingerprint="g", incarnation="a3-2")
    assert restores(continued, "a3") == [("job-0", 35)]


def test_with_nothing_to_go_on_from_it_fails_and_never_begins_anew(continued: Any) -> None:
    failure = Failure(code="CHECKPOINT_CORRUPT", message="bad checksum")
    ready = pb.RangesReady(job_id="job-1", term=1, failure=failure)
    continued.say(continued.sessions["a3"], ranges_ready=ready)
    assert continued.state() == "FAILED"
    assert continued.job().reason == "START_NOT_USABLE"
    assert "step 35 of job-0" in continued.job().message


def test_ranges_are_cut_and_bits_are_chosen_as_they_were(running: Any) -> None:
    submitted = JobSubmitted(job_id="job-2")
    submitted.plan.bitwise = True
    submitted.continued.checkpoint.CopyFrom(manifest("job-1", 5, ranges=3))
    keep_cut_and_bits(submitted, running.core)
    assert (submitted.plan.range_count, submitted.plan.fingerprint) == (3, "f")
