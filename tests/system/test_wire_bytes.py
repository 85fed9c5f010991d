"""What crosses the wire, as the aggregator's metrics tell it, with and without thin links."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

import phalanx
from phalanx.testing.arena import GUARD_S
from phalanx.testing.datasets import digits

pytestmark = pytest.mark.slow

STEPS = 60


@pytest.fixture(scope="module")
def cluster() -> Iterator[phalanx.LocalCluster]:
    features, targets = digits()
    with phalanx.LocalCluster(workers=2, slots=1) as local:
        local.data.add("digits", features, targets, test=0.2)
        yield local


def bytes_of(cluster: phalanx.LocalCluster, **train: Any) -> dict[tuple[str, str], float]:
    """Bytes by (direction, encoding) of one job; encoding `whole`: without compression."""
    job = cluster.submit(
        {
            "name": "bytes",
            "data": {"name": "digits", "shards": 4},
            "train": {
                "model": {"mlp": {"hidden": [512]}},
                "batch_size": 256,
                "stop": {"steps": STEPS},
                "evaluation": {"every_steps": 1000},
                **train,
            },
        }
    )
    job.wait(timeout_s=GUARD_S)
    found: dict[tuple[str, str], float] = {}
    for process in cluster.processes():
        if process.role != "aggregator":
            continue
        url = f"http://{process.metrics_address}/metrics"
        with urllib.request.urlopen(url, timeout=GUARD_S) as response:
            lines = response.read().decode().splitlines()
        for line in lines:
            name, _, value = line.rpartition(" ")
            if f'job_id="{job.id}"' not in name or not name.startswith("phalanx_wire_"):
                continue
            labels = dict(each.split("=") for each in name[name.index("{") + 1 : -1].split(","))
            key = labels["direction"].strip('"'), labels.get("encoding", '"whole"').strip('"')
            found[key] = found.get(key, 0.0) + float(value)
    return found


def test_int8_up_and_bfloat16_down_send_a_quarter_and_a_half(
    cluster: phalanx.LocalCluster,
) -> None:
    plain = bytes_of(cluster)
    assert plain["in", "raw"] == plain["in", "whole"]
    assert plain["out", "raw"] == plain["out", "whole"]
    thin = bytes_of(cluster, compression={"int8": {}, "down_cast_to": "bfloat16"})
    # Version 0 comes up as it is.
    up = (thin["in", "int8"] + thin["in", "raw"]) / thin["in", "whole"]
    down = thin["out", "bfloat16"] / thin["out", "whole"]
    print(f"up {up:.3f}, down {down:.3f}")
    assert 0.25 < up < 0.27
    assert 0.5 < down < 0.51


def test_top_k_and_sign_send_a_few_hundredths(cluster: phalanx.LocalCluster) -> None:
    for kind, options, most in (("top_k", {"fraction": 0.01}, 0.04), ("sign", {}, 0.065)):
        thin = bytes_of(cluster, compression={kind: options})
        up = (thin["in", kind] + thin["in", "raw"]) / thin["in", "whole"]
        # The states of the four nodes come up once in the 60 steps, and version 0.
        assert thin["in", "raw"] < thin["in", "whole"] / 40
        print(f"{kind}: up {up:.3f}")
        assert 0.01 < up < most


def test_local_steps_send_as_much_in_so_many_steps_less(cluster: phalanx.LocalCluster) -> None:
    every = bytes_of(cluster)
    tenth = bytes_of(cluster, local={"steps": 10}, stop={"steps": STEPS // 10})
    ratio = tenth["in", "raw"] / every["in", "raw"]
    print(f"up {ratio:.3f}")
    assert 0.1 <= ratio < 0.13, "and version 0 once"
