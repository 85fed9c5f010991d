"""Two control processes: one is killed or stopped, alone or together with a worker."""

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

import phalanx
from phalanx.sdk.job import Job
from phalanx.testing.arena import GUARD_S, Arena, arena, wait_until

pytestmark = pytest.mark.slow


def commits(job: Job) -> list[float]:
    """When each step was committed, as the aggregator wrote it down."""
    points = [point for point in job.metric_messages() if point.name == "train/loss"]
    return [point.time.ToNanoseconds() / 1e9 for point in points]


def leader_of(ring: Arena) -> str:
    return str(ring.cluster.describe().leader)


def test_control_and_a_worker_die_together_and_training_goes_on(
    tmp_path: Path, long_job: dict[str, Any], long_sha256: str
) -> None:
    with arena(tmp_path, 3, controls=2) as ring:
        job = ring.cluster.submit(long_job)
        ring.at_step(job, 10)
        victim = ring.caught_in_a_leaf()[0]
        generation = ring.cluster.describe().generation
        for member in (leader_of(ring), victim):
            ring.signal(member)
        killed_unix_s = time.time()
        ring.gate.release()
        result = job.wait(timeout_s=GUARD_S)
        wait_until(lambda: ring.cluster.describe().generation > generation, "a new leader")
        took = ring.events("CONTROL_TOOK_OVER")[-1]
        alone = [at for at in commits(job) if killed_unix_s < at < took.time.timestamp()]
        assert len(alone) > 5, "nobody gave the dead worker's shards away until control was back"
        assert not ring.events("STEPS_REPLAYED")
    assert result.parameters_sha256 == long_sha256
    assert (result.examples_lost, result.examples_doubled) == (0, 0)


def test_a_stopped_leader_is_left_by_its_members(
    tmp_path: Path, long_job: dict[str, Any], long_sha256: str
) -> None:
    """It holds all its sockets open, and it believes to lead when it goes on."""
    with arena(tmp_path, 2, controls=2) as ring:
        job = ring.cluster.submit(long_job)
        ring.at_step(job, 10)
        ring.caught_in_a_leaf()
        leader = ring.cluster.process(leader_of(ring))
        (standby,) = [
            member
            for member in ring.cluster.processes()
            if member.role == "control" and member.id != leader.id
        ]
        with phalanx.connect(standby.address) as other:
            os.kill(leader.pid, signal.SIGSTOP)
            try:
                wait_until(lambda: other.describe().leader == standby.id, "the standby to lead")
                wait_until(
                    lambda: [w for w in other.describe().workers if w.state == w.STATE_READY][1:],
                    "both workers to find the new leader",
                )
                ring.gate.release()
                result = other.get(job.id).wait(timeout_s=GUARD_S)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(leader.pid, signal.SIGCONT)
            with phalanx.connect(leader.address) as old:
                wait_until(lambda: old.describe().leader == standby.id, "the old one to hand on")
                assert old.get(job.id).refresh().state == "SUCCEEDED"
            events = [event.type for event in other.events()]
        assert "STEPS_REPLAYED" not in events
    assert result.parameters_sha256 == long_sha256
