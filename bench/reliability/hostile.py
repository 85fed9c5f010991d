"""What hostile peers cost a server's memory, and its honest callers time.

A cluster of real processes; each attack stands against each server in turn while an honest caller
goes on, every few calls on a connection of its own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bench.clusters import cluster
from bench.reliability.rows import Row, Rows
from phalanx.rpc.channel import channel_options
from phalanx.testing.attackers import ATTACKS, Attack
from phalanx.v1 import (
    cluster_service_pb2,
    cluster_service_pb2_grpc,
    dataset_service_pb2,
    dataset_service_pb2_grpc,
)

MIB = 1024 * 1024
MEMORY_REACH_MIB = 64
P99_REACH_MS = 100
CALLS = 500
_NEW_CONNECTION_EVERY = 20
_PAUSE_S = 0.005
_TIMEOUT_S = 30.0


def run(command: str, *, quick: bool) -> list[Row]:
    """Memory growth and the p99 of honest calls, the worst over servers and attacks."""
    calls = CALLS // 5 if quick else CALLS
    p99_ms: dict[str, float] = {}
    growth_mib: dict[str, float] = {}
    with cluster(workers=1) as running:
        for id, call in _HONEST.items():
            server = running.process(id)
            _latencies_ms(server.address, call, 100)
            before = _rss_bytes(server.pid)
            p99_ms[f"{id} left alone"] = _p99(_latencies_ms(server.address, call, calls))
            for kind in ATTACKS:
                _forget_peak(server.pid)
                attack = Attack(kind, server.address)
                with attack:
                    latencies = _latencies_ms(server.address, call, calls)
                name = f"{id} under {kind}"
                p99_ms[name] = _p99(latencies)
                growth_mib[name] = (_peak_bytes(server.pid) - before) / MIB
                print(
                    f"    {name}: p99 {p99_ms[name]:.1f} ms, {growth_mib[name]:+.1f} MiB; "
                    f"{attack.report}",
                    flush=True,
                )
            assert running.process(id).pid == server.pid, f"{id} died"
    undisturbed = {name: p99_ms.pop(name) for name in list(p99_ms) if "left alone" in name}
    worst, slowest = (
        max(growth_mib, key=growth_mib.__getitem__),
        max(p99_ms, key=p99_ms.__getitem__),
    )
    made = Rows(command, quick)
    return [
        made.largest(
            "hostile_memory_growth_mib",
            "peak memory of a server under hostile input, above what it had before",
            list(growth_mib.values()),
            "MiB",
            MEMORY_REACH_MIB,
            f"the most: {worst}; attacks: {', '.join(ATTACKS)}",
        ),
        made.largest(
            "hostile_honest_p99_ms",
            "p99 of honest calls meanwhile",
            list(p99_ms.values()),
            "ms",
            P99_REACH_MS,
            f"the slowest: {slowest}, of {calls} calls each; "
            f"left alone {max(undisturbed.values()):.1f} ms",
        ),
    ]


Call = Callable[[grpc.Channel], Any]


def _ask_control(channel: grpc.Channel) -> None:
    stub: Any = cluster_service_pb2_grpc.ClusterServiceStub(channel)  # type: ignore[arg-type]
    stub.GetCluster(cluster_service_pb2.GetClusterRequest(), timeout=_TIMEOUT_S)


def _ask_storage(channel: grpc.Channel) -> None:
    stub: Any = dataset_service_pb2_grpc.DatasetServiceStub(channel)  # type: ignore[arg-type]
    stub.ListDatasets(dataset_service_pb2.ListDatasetsRequest(), timeout=_TIMEOUT_S)


def _ask_aggregator(channel: grpc.Channel) -> None:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    stub.Check(health_pb2.HealthCheckRequest(), timeout=_TIMEOUT_S)


_HONEST: dict[str, Call] = {
    "storage": _ask_storage,
    "control-1": _ask_control,
    "aggregator-1": _ask_aggregator,
}


def _latencies_ms(address: str, call: Call, count: int) -> list[float]:
    """Milliseconds of each call; those on new connections include connecting."""
    options = channel_options(own_connection=True)
    latencies = []
    with grpc.insecure_channel(address, options=options) as kept:
        for index in range(count):
            time.sleep(_PAUSE_S)
            is_new = index % _NEW_CONNECTION_EVERY == 0
            began = time.perf_counter()
            if is_new:
                with grpc.insecure_channel(address, options=options) as channel:
                    call(channel)
            else:
                call(kept)
            latencies.append((time.perf_counter() - began) * 1000)
    return latencies


def _p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100)[98]


def _forget_peak(pid: int) -> None:
    """Have the kernel measure the peak anew."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def _peak_bytes(pid: int) -> int:
    return _status_bytes(pid, "VmHWM")


def _rss_bytes(pid: int) -> int:
    return _status_bytes(pid, "VmRSS")


def _status_bytes(pid: int, key: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    raise KeyError(key)
