"""From a shard that poisons a job to the list of dead letters, and on to the end of the job."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import phalanx
from phalanx.cli.main import run
from phalanx.clients.storage import SyncStorageClient
from phalanx.sdk.job import JobFailed
from phalanx.testing.arena import GUARD_S, arena, held_job, undisturbed_sha256_of, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.same_bits]

ROWS, SHARDS, BAD_ROW = 440, 11, 130
ROWS_EACH = ROWS // SHARDS
BAD_SHARD = BAD_ROW // ROWS_EACH

MODEL = '''
"""The model that is held later; while a file is there it cannot read one row."""

import numpy as np

from gated import GATE
from later import Later


class Picky(Later):
    def loss_and_gradients(self, parameters, features, targets):
        done = super().loss_and_gradients(parameters, features, targets)
        picky = self.is_later(parameters) and (GATE / "picky").exists()
        if picky and (np.rint(features[:, 0] * 1000) == 130).any():
            raise ValueError("a colour that nobody has seen")
        return done
'''


def add_numbered(cluster: phalanx.Cluster) -> None:
    """Rows whose first feature is their number, in thousands."""
    features = np.random.default_rng(5).standard_normal((ROWS, 4)).astype(np.float32)
    features[:, 0] = np.arange(ROWS) / 1000
    cluster.data.add("numbered", features, np.arange(ROWS) % 3)


def picky_job() -> dict[str, Any]:
    """Each step reads every row. Leaves are held, and a row is bad, after the first checkpoint."""
    job = held_job(after_steps=12, batch_size=ROWS)
    job["data"] = {"name": "numbered", "shards": SHARDS}
    job["code"]["files"]["picky.py"] = MODEL
    del job["train"]["evaluation"]
    custom = job["train"]["model"]["custom"]
    job["train"]["model"] = {
        "custom": {**custom, "entrypoint": "picky:Picky"},
        "standardise": False,
    }
    return job


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    def call(cluster: phalanx.LocalCluster, *arguments: str) -> tuple[str, str]:
        capfd.readouterr()
        code = run(["--address", cluster.address, *arguments])
        out, err = capfd.readouterr()
        assert code == 0, err
        return out, err

    return call


def test_a_poisoned_job_is_listed_mended_and_retried(
    tmp_path: Path, cli: Callable[..., tuple[str, str]]
) -> None:
    undisturbed = undisturbed_sha256_of(picky_job(), tmp_path, add_numbered)
    (tmp_path / "picky").touch()
    with arena(tmp_path, 2) as ring:
        add_numbered(ring.cluster)
        assert "no job has failed" in cli(ring.cluster, "jobs", "--dead-letters")[1]
        job = ring.submit_held(picky_job(), workers=2)
        wait_until(lambda: job.refresh().progress.checkpoint_step >= 10, "a checkpoint")
        step = job.progress.step
        ring.gate.release()
        with pytest.raises(JobFailed):
            job.wait(timeout_s=GUARD_S)

        (letter,) = json.loads(cli(ring.cluster, "--json", "jobs", "--dead-letters")[0])[
            "dead_letters"
        ]
        assert (letter["job_id"], letter["code"]) == (job.id, "POISON_SHARD")
        assert letter["shard"] == BAD_SHARD
        assert int(letter["first_row"]) == BAD_SHARD * ROWS_EACH
        assert int(letter["row_count"]) == ROWS_EACH
        assert letter["attempts"] >= 2
        assert set(letter["worker_ids"]) == {"worker-1", "worker-2"}
        assert "ValueError: a colour that nobody has seen" in letter["message"]
        assert "picky.py" in letter["traceback"]
        out, err = cli(ring.cluster, "jobs", "--dead-letters")
        rows = f"rows {BAD_SHARD * ROWS_EACH} to {(BAD_SHARD + 1) * ROWS_EACH - 1}"
        assert f"{job.id}  POISON_SHARD  shard {BAD_SHARD}, {rows}, step" in out
        assert "a colour that nobody has seen" in out
        assert "phalanx retry" in err
        with SyncStorageClient(ring.cluster.process("storage").address) as storage:
            newest = storage.list_checkpoints(job.id)[0]

        (tmp_path / "picky").unlink()
        cli(ring.cluster, "retry", job.id)
        result = job.refresh().wait(timeout_s=GUARD_S)
        assert result.parameters_sha256 == undisturbed
        assert (result.steps, result.bit_identical) == (60, True)
        assert (result.examples_lost, result.examples_doubled) == (0, 0)
        assert "no job has failed" in cli(ring.cluster, "jobs", "--dead-letters")[1]
        assert 10 <= newest.step <= step
        _, again = ring.events("JOB_STARTED")
        assert f"from the checkpoint at step {newest.step}" in again.message
