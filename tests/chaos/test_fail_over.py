"""Two control processes: one is killed or stopped, alone or together with a worker."""

import contextlib
from pathlib import Path
from typing import Any

import pytest

import phalanx
from phalanx.clients.storage import SyncStorageClient
from phalanx.local.state import Member
from phalanx.testing.arena import GUARD_S, Arena, arena, stopped, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.same_bits]


def controls(ring: Arena) -> tuple[Member, Member]:
    """The control process that leads, and the one that stands by."""
    leader = ring.cluster.describe().leader
    first, second = (each for each in ring.cluster.processes() if each.role == "control")
    return (first, second) if first.id == leader else (second, first)


def test_control_and_a_worker_die_together_and_training_goes_on(
    tmp_path: Path, long_job: dict[str, Any], long_sha256: str
) -> None:
    with arena(tmp_path, 3, controls=2) as ring:
        job = ring.submit(long_job)
        victim = ring.caught_at(job, 10)[0]
        generation = ring.cluster.describe().generation
        leader, standby = controls(ring)
        step = job.refresh().progress.step
        with (
            SyncStorageClient(ring.cluster.process("storage").address) as storage,
            stopped(standby.pid),
        ):

            def goes_on_without_control() -> bool:
                if ring.cluster.process(leader.id).pid:  # it was started again
                    with contextlib.suppress(ProcessLookupError):
                        ring.signal(leader.id)
                return any(each.step > step + 5 for each in storage.list_checkpoints(job.id))

            ring.signal(leader.id)
            ring.signal(victim)
            ring.gate.release()
            wait_until(goes_on_without_control, "others to compute the shards of the dead worker")
        result = job.wait(timeout_s=GUARD_S)
        wait_until(lambda: ring.cluster.describe().generation > generation, "a new leader")
        assert not ring.events("STEPS_REPLAYED")
    assert result.parameters_sha256 == long_sha256
    assert (result.examples_lost, result.examples_doubled) == (0, 0)


def test_a_stopped_leader_is_left_by_its_members(
    tmp_path: Path, long_job: dict[str, Any], long_sha256: str
) -> None:
    """It holds all its sockets open, and it believes to lead when it goes on."""
    with arena(tmp_path, 2, controls=2) as ring:
        job = ring.submit(long_job)
        ring.caught_at(job, 10)
        leader, standby = controls(ring)
        with phalanx.connect(standby.address) as other:
            with stopped(leader.pid):
                wait_until(lambda: other.describe().leader == standby.id, "the standby to lead")
                wait_until(
                    lambda: [w for w in other.describe().workers if w.state == w.STATE_READY][1:],
                    "both workers to find the new leader",
                )
                ring.gate.release()
                result = other.get(job.id).wait(timeout_s=GUARD_S)
            with phalanx.connect(leader.address) as old:
                wait_until(lambda: old.describe().leader == standby.id, "the old one to hand on")
                assert old.get(job.id).refresh().state == "SUCCEEDED"
            events = [event.type for event in other.events()]
        assert "STEPS_REPLAYED" not in events
    assert result.parameters_sha256 == long_sha256
