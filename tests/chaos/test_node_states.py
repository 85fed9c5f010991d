"""What a lossy contribution leaves out goes with its node, whoever dies, and what a shard's own
optimizer remembers goes with its shard.

States are handed in every 5 versions, so each death is after one and before the next.
"""

from pathlib import Path
from typing import Any

import numpy as np
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
from phalanx.training.leaf import LeafOutcome, LocalSteps

pytestmark = [pytest.mark.slow, pytest.mark.same_bits]

FEEDBACK: dict[str, Any] = {"compression": {"top_k": {"fraction": 0.1}, "down_cast_to": "float16"}}
OUTER = {"sgd": {"learning_rate": 0.7, "momentum": 0.9, "nesterov": True}}
INNER: dict[str, Any] = {"local": {"steps": 4, "outer": OUTER}}
"""Adam inside, Nesterov outside."""

DOCUMENTS = {
    "shards one by one": gated_job(steps=60, **INNER),
    "nodes of two shards, and what they left out": gated_job(steps=60, **INNER, **FEEDBACK),
}


def hold_at(ring: Arena, jobs: dict[str, phalanx.Job], step: int) -> list[str]:
    """Hold all jobs in a leaf of this step or of one soon after it; who is in one."""
    caught: list[str] = []
    for job in jobs.values():
        caught = ring.caught_at(job, step)
    return caught


def killed(ring: Arena, jobs: dict[str, phalanx.Job], step: int, *others: str) -> None:
    """Kill a worker in the middle of a leaf, and others with it."""
    caught = hold_at(ring, jobs, step)
    victim = caught[0]
    for member in (victim, *others):
        ring.signal(member)


def test_deaths_and_a_pause_between_two_bases(tmp_path: Path) -> None:
    with arena(tmp_path, 3) as ring:
        jobs = {name: ring.submit(document) for name, document in DOCUMENTS.items()}
        killed(ring, jobs, 7)
        killed(ring, jobs, 13, ring.cluster.describe().leader)
        hold_at(ring, jobs, 18)
        assert not ring.events("STEPS_REPLAYED"), "nothing is rolled back for a worker"
        for job in jobs.values():
            job.pause()
        ring.gate.release()
        for job in jobs.values():
            wait_until(lambda job=job: job.refresh().state == "PAUSED", "the pause")
        ring.cluster.add_worker()
        ring.gate.hold()
        for job in jobs.values():
            job.resume()
        killed(ring, jobs, 26, "aggregator-1")
        ring.gate.release()
        results = {name: job.wait(timeout_s=GUARD_S) for name, job in jobs.items()}
        assert ring.events("STEPS_REPLAYED"), "the aggregator's death is"
    for name, result in results.items():
        undisturbed = undisturbed_sha256_of(DOCUMENTS[name], tmp_path)
        assert result.parameters_sha256 == undisturbed, name
        assert result.bit_identical
        assert (result.examples_lost, result.examples_doubled) == (0, 0)


def test_the_states_decide_something(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = gated_job(steps=8, **INNER, **FEEDBACK)
    found = {undisturbed_sha256_of(document, tmp_path)}
    with monkeypatch.context() as patched:
        patched.setattr("phalanx.compressors.sparse.TopK.feedback", False)
        found.add(undisturbed_sha256_of(document, tmp_path))
    run = LocalSteps.run

    def forgetful(steps: LocalSteps, *given: Any) -> LeafOutcome:
        *others, state = given
        return run(steps, *others, {name: np.zeros_like(each) for name, each in state.items()})

    monkeypatch.setattr(LocalSteps, "run", forgetful)
    found.add(undisturbed_sha256_of(document, tmp_path))
    assert len(found) == 3
