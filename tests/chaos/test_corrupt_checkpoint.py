"""Bit rot in a checkpoint of a running cluster: told, gone around, without a trace in the bits."""

from pathlib import Path

import pytest

from phalanx.clients.storage import SyncStorageClient
from phalanx.testing.arena import GUARD_S, arena, gated_job, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.same_bits]


def test_the_checkpoint_before_a_corrupt_one_is_taken(
    tmp_path: Path, undisturbed_sha256: str
) -> None:
    with arena(tmp_path, 2) as ring:
        job = ring.submit(gated_job())
        ring.caught_at(job, 25)
        (address,) = (m.address for m in ring.cluster.processes() if m.role == "storage")
        with SyncStorageClient(address) as storage:
            wait_until(lambda: len(storage.list_checkpoints(job.id)) > 1, "two checkpoints")
            newest, before = storage.list_checkpoints(job.id)[:2]
        ring.kept.damage(newest.parts[0].digest)
        ring.signal("aggregator-1")
        ring.gate.release()
        result = job.wait(timeout_s=GUARD_S)
        (event,) = ring.events("CHECKPOINT_CORRUPT")
        assert f"step {newest.step} cannot be used" in event.message
        replayed = ring.events("STEPS_REPLAYED")
        assert any(f"{before.step}" in each.message for each in replayed)
    assert result.parameters_sha256 == undisturbed_sha256
    assert (result.examples_lost, result.examples_doubled) == (0, 0)
