"""The convolutional network of `examples/cnn` on all of Fashion-MNIST: accurate, and the same bits
on 1, 2 and 4 workers that are killed. `make chaos ARGS="tests/chaos/test_cnn.py -m soak -rP"`."""

from __future__ import annotations

import gzip
import importlib.util
import os
import signal
from pathlib import Path

import numpy as np
import pytest

import phalanx
from phalanx.sdk.job import Job
from phalanx.sdk.values import Result
from phalanx.testing.arena import wait_until
from phalanx.testing.datasets import REPOSITORY, shared_data

pytestmark = [
    pytest.mark.soak,
    pytest.mark.same_bits,
    pytest.mark.timeout(7200),
    pytest.mark.skipif(
        importlib.util.find_spec("torch") is None,
        reason="PyTorch is not installed: pip install 'phalanx[torch]'",
    ),
]

PATIENCE_S = 60.0
KILLS = (20, 200, 400)
"""Of 590 steps: after these a worker that holds shards is killed."""


def held_out(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pictures and labels of the test split, as they are in the files."""
    images = gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / "t10k-labels-idx1-ubyte.gz").read_bytes())
    pixels = np.frombuffer(images, np.uint8, offset=16).reshape(10_000, -1)
    return pixels, np.frombuffer(labels, np.uint8, offset=8)


def with_kills(cluster: phalanx.LocalCluster, job: Job, kills: tuple[int, ...]) -> Result:
    """Watch a job to its end; after each of these steps kill the first worker with shards."""
    left = list(kills)
    for update in job.watch():
        holders = [each.worker_id for each in update.workers if each.shards]
        if left and holders and update.step >= left[0]:
            del left[0]
            os.kill(cluster.process(holders[0]).pid, signal.SIGKILL)
    assert not left, "the job was over before all workers could be killed"
    return job.wait(timeout_s=PATIENCE_S)


def trained(folder: Path, workers: int, kills: tuple[int, ...]) -> tuple[Result, float]:
    """Result of the example, and the accuracy of its model's predictions."""
    with phalanx.LocalCluster(workers=workers, slots=1) as cluster:
        cluster.data.add("fashion", folder)
        wait_until(lambda: len(cluster.workers()) == workers, "all workers to join")
        job = cluster.submit(phalanx.load(REPOSITORY / "examples" / "cnn" / "job.yaml"))
        result = with_kills(cluster, job, kills)
        lost = [each for each in cluster.events() if each.type == "WORKER_LOST"]
        assert len(lost) >= len(kills)
        model = cluster.models.get(result.model, allow_code=True)
        pixels, labels = held_out(folder)
        return result, float((model.predict(pixels) == labels).mean())


def test_nine_of_ten_pictures_and_the_same_bits_on_any_number_of_workers() -> None:
    folder = shared_data("fashion-mnist")
    hashes = set()
    for workers, kills in ((1, ()), (2, KILLS), (4, KILLS)):
        result, accuracy = trained(folder, workers, kills)
        print(f"{workers}: {result.metrics['test/accuracy']:.4f} {result.parameters_sha256}")
        assert result.metrics["test/accuracy"] >= 0.90
        assert accuracy == pytest.approx(result.metrics["test/accuracy"])
        assert (result.examples_lost, result.examples_doubled) == (0, 0)
        hashes.add(result.parameters_sha256)
    assert len(hashes) == 1
