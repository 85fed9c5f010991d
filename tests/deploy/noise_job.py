"""A job and its data; as a program it runs the job in its own process and prints the SHA-256.

The containers' own libraries, processor and settings must compute what theirs is compared with, so
this is also run inside of the image.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import phalanx

GUARD_S = 180.0
STEPS = 8000


def job() -> dict[str, Any]:
    """Steps so many and so small that whoever kills has time."""
    return {
        "name": "in-containers",
        "data": {"name": "noise", "shards": 8},
        "train": {
            "model": {"mlp": {"hidden": [64]}},
            "optimizer": {"adam": {"learning_rate": 0.001}},
            "batch_size": 512,
            "stop": {"steps": STEPS},
            "evaluation": {"every_steps": 100},
            "checkpoints": {"every_steps": 100},
        },
    }


def add_noise(cluster: phalanx.Cluster) -> None:
    """Add the data set."""
    generator = np.random.default_rng(5)
    features = generator.standard_normal((2000, 100)).astype(np.float32)
    cluster.data.add("noise", features, (features[:, 0] > 0).astype(np.int64), test=0.2)


def main() -> None:
    """Compute what every cluster has to compute."""
    with phalanx.LocalCluster(workers=0) as alone:
        add_noise(alone)
        print(alone.submit(job()).wait(timeout_s=GUARD_S).parameters_sha256)


if __name__ == "__main__":
    main()
