"""Every way of training keeps its bits through a death in the middle of a leaf."""

from pathlib import Path
from typing import Any

import pytest

import phalanx
from phalanx.testing.arena import (
    GUARD_S,
    Arena,
    add_blobs,
    arena,
    gated_job,
    stopped,
    undisturbed_sha256_of,
    wait_until,
)

pytestmark = pytest.mark.slow

MODES: dict[str, dict[str, Any]] = {
    "median, float16": {"compression": {"cast_to": "float16"}, "reduction": {"median": {}}},
    "int8, down bfloat16, a norm": {
        "compression": {"int8": {"bucket": 16}, "down_cast_to": "bfloat16"},
        "optimizer": {"adam": {"learning_rate": 0.01}, "clip_norm": 0.5},
    },
    "local steps": {
        "local": {"steps": 4, "outer": {"sgd": {"learning_rate": 0.7, "momentum": 0.9}}},
        "optimizer": {"sgd": {"learning_rate": 0.01}},
        "compression": {"cast_to": "bfloat16"},
        "data": {"rows": {"stratified": True}},
    },
    "top-k, a version in half its bits": {
        "compression": {"top_k": {"fraction": 0.1}, "down_cast_to": "bfloat16"},
        "checkpoints": {"every_steps": 10},
    },
    "sign, momentum": {
        "compression": {"sign": {}},
        "optimizer": {"sgd": {"learning_rate": 0.05, "momentum": 0.9}},
    },
    "multi-krum, oversampled": {
        "reduction": {"krum": {"faulty": 2, "keep": 5}, "clip_norm": 20.0},
        "data": {"oversample": {}},
    },
}


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with arena(tmp_path_factory.mktemp("gate"), 3) as ring:
        yield ring


@pytest.fixture(scope="module")
def plain_sha256(tmp_path_factory: pytest.TempPathFactory) -> str:
    return undisturbed_sha256_of(gated_job(steps=30), tmp_path_factory.mktemp("gate"))


@pytest.mark.same_bits
@pytest.mark.parametrize("mode", MODES)
def test_a_worker_killed_in_the_middle_of_a_leaf(
    ring: Arena, plain_sha256: str, tmp_path: Path, mode: str
) -> None:
    train = {**MODES[mode]}
    data = train.pop("data", {})
    document = gated_job(steps=30, **train)
    document["data"] = {**document["data"], **data}
    with phalanx.LocalCluster(workers=0) as alone:
        add_blobs(alone)
        undisturbed = alone.submit(document).wait(timeout_s=GUARD_S).parameters_sha256
    assert undisturbed != plain_sha256, "the mode changes nothing, so nothing is shown"
    job = ring.submit(document)
    ring.signal(ring.caught_at(job, 5)[0])
    ring.gate.release()
    result = job.wait(timeout_s=GUARD_S)
    assert result.parameters_sha256 == undisturbed
    assert (result.examples_lost, result.examples_doubled) == (0, 0)


def test_backup_shards_do_without_a_stopped_worker_and_count_what_they_leave_out(
    ring: Arena,
) -> None:
    document = gated_job(
        steps=200, synchronous={"backup_shards": 5}, evaluation={"every_steps": 1000}
    )
    document["reproducibility"] = {"tolerant": {}}
    job = ring.submit(document)
    victim = ring.cluster.process(ring.caught_at(job, 5)[0])
    with stopped(victim.pid):
        ring.gate.release()
        before = job.refresh().progress.step
        wait_until(lambda: job.refresh().progress.step >= before + 20 or job.done, "20 more steps")
    result = job.wait(timeout_s=GUARD_S)
    assert result.steps == 200
    assert result.examples_lost > 0
    assert result.examples_doubled == 0
    assert not result.bit_identical
