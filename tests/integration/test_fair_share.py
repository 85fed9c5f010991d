"""Two jobs on one slot of a real worker: the larger part for the one of more priority, something
for the other, and all of it for one that is alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import phalanx
from phalanx.testing.arena import GUARD_S, SOFTMAX_MODEL, add_blobs, wait_until

MARKS = "PHALANX_TEST_MARKS"
LEAVES, STEPS = 4, {"large": 36, "small": 72}
"""The small one outlasts the other also where that comes seconds late."""
PRIORITIES = {"large": 75, "small": 25}

MARKING = f'''
"""A softmax regression whose leaves say whose they are and, on a cluster, take their time."""

import os
import time

from softmax import Softmax

MARKS = os.environ.get("{MARKS}")


class Marking(Softmax):
    def __init__(self, schema, name):
        super().__init__(schema)
        self.name = name

    def loss_and_gradients(self, parameters, features, targets):
        if MARKS:
            time.sleep(0.02)
            with open(MARKS, "a") as marks:
                print(self.name, file=marks)
        return super().loss_and_gradients(parameters, features, targets)
'''


def job_of(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "priority": PRIORITIES[name],
        "data": {"name": "blobs", "shards": LEAVES},
        "code": {"files": {"softmax.py": SOFTMAX_MODEL, "marking.py": MARKING}},
        "train": {
            "model": {"custom": {"entrypoint": "marking:Marking", "arguments": {"name": name}}},
            "optimizer": {"adam": {"learning_rate": 0.01}},
            "batch_size": 330,
            "stop": {"steps": STEPS[name]},
            "checkpoints": {"every": "3600s"},
        },
    }


def test_jobs_shrink_and_grow_by_priority_and_end_with_their_bits(
    tmp_path: Path,
) -> None:
    marks = tmp_path / "marks"
    marks.touch()
    with phalanx.LocalCluster(workers=0) as alone:
        add_blobs(alone)
        expected = {
            name: alone.submit(job_of(name)).wait(timeout_s=GUARD_S).parameters_sha256
            for name in PRIORITIES
        }
    with phalanx.LocalCluster(workers=1, slots=1, environment={MARKS: str(marks)}) as cluster:
        add_blobs(cluster)
        small = cluster.submit(job_of("small"))
        wait_until(lambda: small.refresh().progress.step >= 2, "the small job to run alone")
        large = cluster.submit(job_of("large"))
        found = {
            "large": large.wait(timeout_s=GUARD_S).parameters_sha256,
            "small": small.wait(timeout_s=GUARD_S).parameters_sha256,
        }
    assert found == expected
    order = marks.read_text().split()
    # Not by what computes a leaf before the job begins, or evaluates it at the end.
    turns = [place for place, name in enumerate(order) if name == "large"][LEAVES:-LEAVES]
    shared = Counter(order[turns[0] : turns[-1]])
    assert shared["large"] >= 2 * shared["small"] > 0
    # It had everything before the other came, and again once that was through.
    assert set(order[: LEAVES * 2]) == set(order[-LEAVES * 2 :]) == {"small"}
