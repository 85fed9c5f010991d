"""Buffers on real processes: in ranges over aggregators, among workers, and whoever dies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from phalanx.testing.arena import (
    GATED_MODEL,
    GUARD_S,
    SOFTMAX_MODEL,
    arena,
    undisturbed_sha256_of,
    wait_until,
)
from phalanx.testing.running_model import RUNNING_MODEL

pytestmark = [pytest.mark.slow, pytest.mark.same_bits]

GATED = '''
"""The model with a buffer; its leaves wait at the gate."""

from gated import wait
from running import Running


class Net(Running):
    def gradient(self, parameters, batch, out):
        wait()
        return super().gradient(parameters, batch, out)
'''

BLOCK = 65_536
SPARE = 3 * BLOCK
"""So large that the buffer is in several ranges."""

MODES: dict[str, dict[str, Any]] = {
    "synchronous": {},
    "all_reduce": {"all_reduce": {}},
}


def job(**train: Any) -> dict[str, Any]:
    files = {
        "softmax.py": SOFTMAX_MODEL,
        "gated.py": GATED_MODEL,
        "running.py": RUNNING_MODEL,
        "net.py": GATED,
    }
    return {
        "name": "buffers",
        "data": {"name": "blobs", "shards": 5},
        "code": {"files": files},
        "train": {
            "model": {"custom": {"entrypoint": "net:Net", "arguments": {"spare": SPARE}}},
            "optimizer": {"sgd": {"learning_rate": 0.01, "momentum": 0.9}},
            "batch_size": 150,
            "stop": {"steps": 12},
            "evaluation": {"every_steps": 6},
            "checkpoints": {"every_steps": 4},
            **train,
        },
    }


@pytest.mark.parametrize("mode", MODES)
def test_the_bits_of_one_process_with_a_death_in_the_middle(tmp_path: Path, mode: str) -> None:
    document = job(**MODES[mode])
    expected = undisturbed_sha256_of(document, tmp_path)
    ranges = {"PHALANX_CONTROL_RANGE_MIN_BYTES": str(BLOCK * 4)}
    with arena(tmp_path, 2, aggregators=3, environment=ranges) as ring:
        wait_until(
            lambda: sum(each.connected for each in ring.cluster.describe().aggregators) == 3,
            "all aggregators",
        )
        running = ring.submit(document)
        ring.caught_at(running, 5)
        ring.signal(ring.caught_with_shards(running))
        wait_until(lambda: ring.events("WORKER_LOST"), "the death to be seen")
        ring.gate.release()
        result = running.wait(timeout_s=GUARD_S)
        assert result.parameters_sha256 == expected
        assert (result.examples_lost, result.examples_doubled) == (0, 0)
        if mode == "synchronous":
            assert "3 ranges on" in ring.events("JOB_STARTED")[0].message
        model = ring.cluster.models.get(result.model, allow_code=True)
        assert "mean" in {each["name"] for each in model.document["layout"]["tensors"]}
