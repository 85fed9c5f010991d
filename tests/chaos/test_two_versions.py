"""Processes of one version of the protocol and of the next one run a job together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

import phalanx
from phalanx.local.ports import free_ports
from phalanx.rpc import protocol
from phalanx.testing.arena import GUARD_S, add_blobs, gated_job, wait_until
from phalanx.testing.calling import Callers
from phalanx.testing.proxied_cluster import ServiceProcess

pytestmark = [
    pytest.mark.slow,
    pytest.mark.same_bits,
    # A list that says that it may lack something, while storage is away, is an answer.
    pytest.mark.filterwarnings("ignore::phalanx.errors.IncompleteWarning"),
]

NOW = f"{protocol.OLDEST}-{protocol.NEWEST}"
NEXT = f"{protocol.NEWEST}-{protocol.NEWEST + 1}"
TOO_NEW = f"{protocol.NEWEST + 1}-{protocol.NEWEST + 2}"

MIXED = {"control": NOW, "storage": NEXT, "aggregator": NEXT, "worker-1": NOW, "worker-2": NEXT}
TURNED = {name: NOW if version == NEXT else NEXT for name, version in MIXED.items()}


class Mixture:
    """A cluster whose processes each speak the versions that they were started with."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder, self._stack = folder, stack
        storage, control, aggregator = (f"127.0.0.1:{port}" for port in free_ports(3))
        self.control = control
        both = ("--control", control, "--storage", storage)
        self._arguments: dict[str, tuple[str, ...]] = {
            "storage": ("storage", "--listen", storage, "--state", str(folder / "state")),
            "control": ("coordinator", "control", "--listen", control, "--storage", storage),
            "aggregator": ("coordinator", "aggregator", "--listen", aggregator, *both),
        }
        for number in (1, 2, 3):
            cache = str(folder / f"cache-{number}")
            worker = ("worker", *both, "--slots", "1", "--cache-dir", cache)
            self._arguments[f"worker-{number}"] = worker
        self.processes: dict[str, ServiceProcess] = {}

    def start(self, name: str, versions: str) -> ServiceProcess:
        """Start a process, instead of the one of this name if there is one."""
        if (old := self.processes.get(name)) is not None:
            old.process.terminate()
            assert old.process.wait(GUARD_S) == 0, old.log()
        arguments = self._arguments[name]
        if versions != NOW:
            arguments = ("phalanx.testing.next_version", versions, *arguments)
        environment = {"PHALANX_TEST_GATE": str(self._folder), "PHALANX_TEST_LEAF_S": "0.03"}
        made = ServiceProcess(name, arguments, self._folder, environment)
        self._stack.callback(made.kill)
        self.processes[name] = made
        return made


@contextmanager
def mixture(folder: Path, versions: Mapping[str, str]) -> Iterator[tuple[Mixture, phalanx.Cluster]]:
    with ExitStack() as stack:
        mixed = Mixture(folder, stack)
        for name, spoken in versions.items():
            mixed.start(name, spoken)
        for process in mixed.processes.values():
            process.wait_until_ready()
        cluster = stack.enter_context(phalanx.connect(mixed.control))
        add_blobs(cluster)
        yield mixed, cluster


@pytest.mark.parametrize(
    "versions", [MIXED, pytest.param(TURNED, marks=pytest.mark.soak)], ids=["mixed", "turned"]
)
def test_two_versions_train_together_and_control_changes_its_own(
    tmp_path: Path, long_job: dict[str, Any], long_sha256: str, versions: dict[str, str]
) -> None:
    with mixture(tmp_path, versions) as (mixed, cluster):
        wait_until(lambda: len(cluster.workers()) == 2, "both workers")
        job = cluster.submit(long_job)
        with Callers(cluster, job.id, gated_job(steps=2)) as callers:
            wait_until(lambda: job.refresh().progress.step >= 5, "steps of both")
            hosts = {each.worker_id for each in job.progress.workers if each.shards}
            other = NEXT if versions["control"] == NOW else NOW
            mixed.start("control", other).wait_until_ready()
            callers.next_round()
            result = job.wait(timeout_s=GUARD_S)
            small = callers.finish()
    assert hosts == {"worker-1", "worker-2"}
    assert callers.failures == []
    assert result.parameters_sha256 == long_sha256
    assert (result.examples_lost, result.examples_doubled) == (0, 0)
    assert len(small) == 2


def test_who_shares_no_version_is_told_what_to_upgrade(tmp_path: Path) -> None:
    with ExitStack() as stack:
        mixed = Mixture(tmp_path, stack)
        for name in ("storage", "control"):
            mixed.start(name, NOW)
        for process in mixed.processes.values():
            process.wait_until_ready()
        stranger = mixed.start("worker-3", TOO_NEW)
        wait_until(lambda: "this process is too old" in stranger.log(), "the refusal")
        with phalanx.connect(mixed.control) as cluster:
            assert list(cluster.workers()) == []
        assert "storage first, then control, aggregators, workers" in stranger.log()
