"""What a lossy contribution leaves out goes with its node, whoever dies.

The state is handed in every 10 versions, so each death is after one and before the next.
"""

from pathlib import Path
from typing import Any

import pytest

import phalanx
from phalanx.testing.arena import (
    GUARD_S,
    Arena,
    arena,
    gated_job,
    undisturbed_sha256_of,
    wait_until,
)

pytestmark = [pytest.mark.slow, pytest.mark.same_bits]

TRAIN: dict[str, Any] = {"compression": {"top_k": {"fraction": 0.1}, "down_cast_to": "float16"}}


def killed(ring: Arena, job: phalanx.Job, step: int, *others: str) -> None:
    """Kill a worker in the middle of a leaf, and others with it."""
    ring.at_step(job, step)
    victim = ring.caught_in_a_leaf()[0]
    for member in (victim, *others):
        ring.signal(member)
    ring.gate.release()


def test_deaths_and_a_pause_between_two_bases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = gated_job(steps=200, **TRAIN)
    undisturbed = undisturbed_sha256_of(document, tmp_path)
    with arena(tmp_path, 3) as ring:
        job = ring.cluster.submit(document)
        killed(ring, job, 13)
        killed(ring, job, 24, ring.cluster.describe().leader)
        ring.at_step(job, 33)
        assert not ring.events("STEPS_REPLAYED"), "nothing is rolled back for a worker"
        job.pause()
        wait_until(lambda: job.refresh().state == "PAUSED", "the pause")
        ring.cluster.add_worker()
        job.resume()
        killed(ring, job, 46, "aggregator-1")
        killed(ring, job, 55)
        result = job.wait(timeout_s=GUARD_S)
        assert ring.events("STEPS_REPLAYED"), "the aggregator's death is"
    assert result.parameters_sha256 == undisturbed
    assert result.bit_identical
    assert (result.examples_lost, result.examples_doubled) == (0, 0)

    monkeypatch.setattr("phalanx.compressors.sparse.TopK.feedback", False)
    assert undisturbed_sha256_of(document, tmp_path) != undisturbed, "the state decides nothing"
