"""A PyTorch module on real processes: convolutions, running statistics and chance, whoever dies."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import phalanx
from phalanx.errors import FailedPrecondition
from phalanx.testing.arena import (
    GATED_MODEL,
    GUARD_S,
    SOFTMAX_MODEL,
    arena,
    undisturbed_sha256_of,
    wait_until,
)
from tests.gpu import needs_gpu

pytestmark = [
    pytest.mark.slow,
    pytest.mark.same_bits,
    pytest.mark.skipif(
        importlib.util.find_spec("torch") is None,
        reason="PyTorch is not installed: pip install 'phalanx[torch]'",
    ),
]

SIDE = 8

NET = '''
"""A small network with all that makes bits differ; its leaves wait at the gate."""

from gated import wait
from torch import nn


class Net(nn.Module):
    def __init__(self, schema):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(64, schema.classes),
        )

    def forward(self, x):
        if self.training:
            wait()
        return self.layers(x)
'''

JOB: dict[str, Any] = {
    "name": "pictures",
    "data": {"name": "pictures", "shards": 5},
    "code": {"files": {"softmax.py": SOFTMAX_MODEL, "gated.py": GATED_MODEL, "net.py": NET}},
    "train": {
        "model": {"torch": {"module": "net:Net"}},
        "optimizer": {"adam": {"learning_rate": 0.02}},
        "batch_size": 200,
        "stop": {"steps": 30},
        "evaluation": {"every_steps": 30},
        "checkpoints": {"every_steps": 4},
    },
}


def pictures() -> tuple[Any, Any]:
    """Noise with a bright spot, whose place is the class."""
    rng = np.random.default_rng(3)
    targets = rng.integers(0, 3, 640)
    features = rng.standard_normal((640, SIDE, SIDE))
    features[np.arange(640), targets * 2, targets * 2] += 6
    return features.reshape(640, -1).astype(np.float32), targets


def add_pictures(cluster: phalanx.Cluster) -> None:
    cluster.data.add("pictures", *pictures(), test=0.2)


@pytest.mark.parametrize("gpus", [0, 1])
def test_any_number_of_workers_with_a_death_in_the_middle(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, gpus: int
) -> None:
    """With a GPU: all workers of this machine have it, each with a slot of its own."""
    if gpus:
        needs_gpu()
    job_file = {**JOB, "resources": {"gpus": gpus}}
    expected = undisturbed_sha256_of(job_file, tmp_path_factory.mktemp("gate"), add_pictures)
    with arena(tmp_path, 1) as ring:
        add_pictures(ring.cluster)
        alone = ring.cluster.submit(job_file).wait(timeout_s=GUARD_S)
        assert alone.parameters_sha256 == expected
        assert alone.metrics["test/accuracy"] > 0.6
        ring.grow_to(2)
        job = ring.submit(job_file)
        ring.caught_at(job, 5)
        ring.signal(ring.caught_with_shards(job))
        wait_until(lambda: ring.events("WORKER_LOST"), "the death to be seen")
        ring.gate.release()
        result = job.wait(timeout_s=GUARD_S)
        assert result.parameters_sha256 == expected
        assert (result.examples_lost, result.examples_doubled) == (0, 0)
        with pytest.raises(FailedPrecondition, match="the model net:Net runs code of its own"):
            ring.cluster.models.get(result.model)
        model = ring.cluster.models.get(result.model, allow_code=True)
        features, targets = pictures()
        assert (model.predict(features) == targets).mean() > 0.6
        scoring = {
            "name": "score",
            "data": {"name": "pictures", "shards": 3},
            "evaluate": {"model": result.model},
            "resources": {"gpus": gpus},
        }
        score = ring.cluster.submit(scoring).wait(timeout_s=GUARD_S)
        accuracy = result.metrics["test/accuracy"]
        assert score.metrics["test/accuracy"] == pytest.approx(accuracy)
