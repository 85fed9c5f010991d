"""A job that goes on from another one ends where one job would have, whatever dies."""

from pathlib import Path
from typing import Any

import pytest

from phalanx.clients.storage import SyncStorageClient
from phalanx.errors import InvalidArgument, NotFound
from phalanx.sdk.verification import verify_job
from phalanx.testing.arena import GUARD_S, arena, gated_job

pytestmark = [pytest.mark.slow, pytest.mark.same_bits]


def test_two_jobs_one_after_the_other_are_one(tmp_path: Path, undisturbed_sha256: str) -> None:
    with arena(tmp_path, 2) as ring:
        first = ring.cluster.submit(gated_job(steps=35))
        assert first.wait(timeout_s=GUARD_S).parameters_sha256 != undisturbed_sha256

        rare = {"every_steps": 100}
        job = ring.submit(gated_job(start={"job": first.id}, checkpoints=rare))
        assert job.message.spec.train.start.job == f"{first.id}@35"
        ring.caught_at(job, 37)
        ring.signal("aggregator-1")  # the job has no checkpoint of its own
        ring.gate.release()
        result = job.wait(timeout_s=GUARD_S)
        assert ring.events("STEPS_REPLAYED")[-1].step == 35
        assert result.parameters_sha256 == undisturbed_sha256
        assert result.steps == 60
        # Progress counts what came before, as it would in one job.
        assert job.refresh().progress.step == 60

        # On a busy machine they come later than every 10 steps.
        with SyncStorageClient(ring.cluster.process("storage").address) as storage:
            kept = [each.step for each in storage.list_checkpoints(first.id)]
        assert kept[0] == 35
        again = ring.cluster.submit(gated_job(start={"job": f"{first.id}@{kept[-1]}"}))
        assert again.wait(timeout_s=GUARD_S).parameters_sha256 == undisturbed_sha256

        with pytest.raises(InvalidArgument, match=r"seed is not as in .*: 7, and there 0"):
            ring.cluster.submit(gated_job(start={"job": first.id}) | {"seed": 7})
        told = ", ".join(map(str, kept))
        with pytest.raises(NotFound, match=f"no checkpoint at step 1: only at step {told}"):
            ring.cluster.submit(gated_job(start={"job": f"{first.id}@1"}))
        with pytest.raises(NotFound, match="no job 'nobody'"):
            ring.cluster.submit(gated_job(start={"job": "nobody"}))


def test_what_a_shard_keeps_and_the_order_of_commits_go_on_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: dict[str, dict[str, Any]] = {
        "top_k": {"compression": {"top_k": {"fraction": 0.25}}},
        "log": {"asynchronous": {"replay_log": True}},
    }
    with arena(tmp_path, 2) as ring:
        monkeypatch.setenv("PHALANX_TEST_GATE", str(ring.gate.folder))
        origin = ring.cluster.submit(gated_job(steps=3)).wait(timeout_s=GUARD_S)
        for name, train in kept.items():
            # States of nodes are handed in at steps that follow from the checkpoints.
            first = ring.cluster.submit(
                gated_job(
                    steps=13,
                    start={"model": origin.model},
                    checkpoints={"every_steps": 8},
                    evaluation={"every_steps": 5},
                    **train,
                )
            )
            first.wait(timeout_s=GUARD_S)
            job = ring.cluster.submit(
                gated_job(steps=20, start={"job": first.id}, **train) | {"labels": {"part": "two"}}
            )
            # The last checkpoint is without states: the steps since the one before come again.
            begins = 8 if name == "top_k" else 13
            assert job.message.spec.train.start.job == f"{first.id}@{begins}"
            assert job.wait(timeout_s=GUARD_S).steps == 20
            verdict = verify_job(ring.cluster, job.id)
            assert verdict.equal, (name, verdict)
            assert verdict.balanced, (name, verdict)
