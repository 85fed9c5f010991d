"""One job's parameters in ranges over several aggregators: the same bits, whatever dies."""

import os
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import phalanx
from phalanx.clients.storage import SyncStorageClient
from phalanx.sdk.job import Job
from phalanx.testing.arena import GUARD_S, in_time, not_over, pause, wait_until

pytestmark = pytest.mark.slow

BLOCK = 65_536
STEPS = 60


def job(steps: int = STEPS) -> dict[str, Any]:
    """An MLP of more than three blocks of parameters."""
    return {
        "name": "wide",
        "data": {"name": "noise", "shards": 3},
        "train": {
            "model": {"mlp": {"hidden": [1200]}},
            "optimizer": {"adam": {"learning_rate": 0.001}},
            "batch_size": 192,
            "stop": {"steps": steps},
            "evaluation": {"every_steps": 20},
            "checkpoints": {"every_steps": 10},
        },
    }


def add_noise(cluster: phalanx.Cluster) -> None:
    generator = np.random.default_rng(5)
    features = generator.standard_normal((800, 200)).astype(np.float32)
    cluster.data.add("noise", features, (features[:, 0] > 0).astype(np.int64), test=0.2)


@pytest.fixture(scope="module")
def expected() -> str:
    """The bits of one process, where nothing is cut into ranges."""
    with phalanx.LocalCluster(workers=0) as cluster:
        add_noise(cluster)
        return cluster.submit(job()).wait(timeout_s=GUARD_S).parameters_sha256


@pytest.fixture(scope="module")
def cluster() -> Iterator[phalanx.LocalCluster]:
    options = {"PHALANX_CONTROL_RANGE_MIN_BYTES": str(BLOCK * 4)}
    with phalanx.LocalCluster(workers=2, slots=1, aggregators=3, environment=options) as local:
        add_noise(local)
        yield local


def wait_for_aggregators(cluster: phalanx.LocalCluster) -> None:
    """A job has its ranges on those that control knows when it begins."""

    def known() -> int:
        return sum(each.connected for each in cluster.describe().aggregators)

    wait_until(lambda: known() == 3, "all aggregators")


def owners(cluster: phalanx.LocalCluster, of: Job) -> str:
    """What the first start of a job says about its ranges."""
    return next(
        event.message
        for event in cluster.events()
        if event.job_id == of.id and event.type == "JOB_STARTED"
    )


def at_step(job: Job, step: int) -> None:
    wait_until(lambda: job.refresh().progress.step >= step or job.done, f"step {step}")
    not_over(job)


def test_three_aggregators_end_in_the_bits_of_one_process(
    cluster: phalanx.LocalCluster, expected: str
) -> None:
    wait_for_aggregators(cluster)
    wide = cluster.submit(job())
    assert wide.wait(timeout_s=GUARD_S).parameters_sha256 == expected
    told = owners(cluster, wide)
    assert "3 ranges" in told
    assert all(f"aggregator-{number}" in told for number in (1, 2, 3))
    with SyncStorageClient(cluster.process("storage").address) as storage:
        manifests = storage.list_checkpoints(wide.id)
        assert manifests
        for manifest in manifests:
            parts = sorted(manifest.parts, key=lambda part: part.range)
            assert [part.range for part in parts] == [0, 1, 2]
            assert len({part.digest for part in parts}) == 3
    model = cluster.models.get(wide.result.model)  # type: ignore[union-attr]
    assert len(model.predict(np.zeros((4, 200), np.float32))) == 4


def test_one_aggregator_is_the_same_too(expected: str) -> None:
    with phalanx.LocalCluster(workers=1, slots=1) as alone:
        add_noise(alone)
        narrow = alone.submit(job())
        assert narrow.wait(timeout_s=GUARD_S).parameters_sha256 == expected
        assert "1 range " in owners(alone, narrow)


@pytest.mark.parametrize("victim", ["aggregator-1", "aggregator-3"])
def test_an_aggregator_of_several_dies(
    cluster: phalanx.LocalCluster, expected: str, victim: str
) -> None:
    wait_until(
        lambda: all(p.metrics_address and p.pid for p in cluster.processes()),
        "all processes to be back",
    )

    def types(of: Job) -> set[str]:
        return {event.type for event in cluster.events() if event.job_id == of.id}

    def struck() -> Job:
        wait_for_aggregators(cluster)
        wide = cluster.submit(job())
        at_step(wide, 12)
        process = cluster.process(victim)
        os.kill(process.pid, signal.SIGKILL)
        wait_until(lambda: "AGGREGATOR_LOST" in types(wide) or wide.refresh().done, "the death")
        if "AGGREGATOR_LOST" not in types(wide):
            not_over(wide)
        return wide

    wide = in_time(struck)
    assert wide.wait(timeout_s=GUARD_S).parameters_sha256 == expected
    assert {"AGGREGATOR_LOST", "STEPS_REPLAYED"} <= types(wide)


def test_pause_and_resume(cluster: phalanx.LocalCluster, expected: str) -> None:
    def paused() -> Job:
        wide = cluster.submit(job())
        at_step(wide, 5)
        pause(wide)
        return wide

    wide = in_time(paused)
    paused_at = wide.progress.step
    assert 5 <= paused_at < STEPS
    wide.resume()
    assert wide.wait(timeout_s=GUARD_S).parameters_sha256 == expected
