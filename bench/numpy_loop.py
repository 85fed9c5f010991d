"""The yardstick of the workers: a plain loop over the same leaves, without any cluster.

Run as ``python -m bench.numpy_loop BLOB_DIR MANIFEST STEPS``; prints examples per second. The
caller sets the environment that gives BLAS one thread, as in a leaf process.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np

from bench.clusters import fashion_job
from phalanx.data.described import described
from phalanx.data.manifest import DatasetManifest
from phalanx.data.reader import ChunkReader
from phalanx.models import DataSchema, build_model
from phalanx.optimizers import build_optimizer
from phalanx.reduction import reduce_leaves
from phalanx.specs import job_plan, load_json, resolve
from phalanx.training.leaf import run_leaf

WARM_UP = 3


def main() -> None:
    """Runs the loop and prints its speed."""
    blobs, manifest_path, steps = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    manifest = DatasetManifest.from_json(manifest_path.read_bytes())
    dataset = described(manifest, "")
    dataset.version = 1
    spec = resolve(load_json(json.dumps(fashion_job("loop", steps))), dataset)
    plan = job_plan(spec, dataset, "loop")
    model = build_model(spec, DataSchema(manifest.features, len(manifest.classes), "float32"))
    optimizer = build_optimizer(spec.train, plan.total_steps)
    reader = ChunkReader(manifest, "train", lambda digest: blobs / digest)
    parameters = model.initial_parameters(0)
    state = {name: np.zeros_like(parameters) for name in optimizer.state_names}
    outs = [np.empty_like(parameters) for _ in range(plan.shards)]
    examples, start = 0, time.perf_counter()
    for step in range(steps):
        if step == WARM_UP:
            examples, start = 0, time.perf_counter()
        count = 0
        for shard, out in enumerate(outs):
            count += run_leaf(model, parameters, reader, plan, shard, step, out).count
        total = reduce_leaves(dict(enumerate(outs)), plan.shards)
        assert total is not None
        following = np.empty_like(parameters)
        optimizer.apply(parameters, total, count, None, state, step, following)
        parameters = following
        examples += count
    print(examples / (time.perf_counter() - start))


if __name__ == "__main__":
    main()
