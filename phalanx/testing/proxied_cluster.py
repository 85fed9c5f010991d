"""A cluster of real processes with proxies between workers and what they speak to.

    with ProxiedCluster(tmp_path, workers=2) as network:
        job = network.cluster.submit(...)
        network.control_links[0].disturb(to_server=Link(black_hole=True))
        network.data_link.reset()
        network.cut_off(1)

Each worker reaches control through a proxy of its own, and all reach the aggregator through one.
Nobody starts again what dies.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import psutil

import phalanx
from phalanx.addresses import split_address
from phalanx.local.ports import free_ports
from phalanx.testing import stores
from phalanx.testing.tcp_proxy import Link, TcpProxy

GUARD_S = 60.0
"""Longest wait for a process to begin or to end; a guard against a hang, not a measure."""


class ServiceProcess:
    """One service (``python -P -m …``) that dies with this process."""

    def __init__(
        self,
        id: str,
        arguments: Sequence[str],
        folder: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.id = id
        self.address = ""
        self._arguments = list(arguments)
        self._log = folder / f"{id}.log"
        self._announcement = folder / f"{id}.json"
        self._environment = dict(environment or {})
        self.process = self._spawn()

    def _spawn(self) -> subprocess.Popen[bytes]:
        self._announcement.unlink(missing_ok=True)
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [
                    *(sys.executable, "-P", "-m", *self._arguments, "--id", self.id),
                    *("--announce", str(self._announcement), "--parent-pid", str(os.getpid())),
                ],
                stdout=log,
                stderr=log,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
                    **self._environment,
                },
                start_new_session=True,
            )

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    def wait_until_ready(self) -> None:
        """Wait for its announcement; RuntimeError with its log if it ends instead."""
        deadline = time.monotonic() + GUARD_S
        while not self._announcement.exists():
            if not self.running or time.monotonic() > deadline:
                raise RuntimeError(f"{self.id} is not ready:\n{self.log()[-4000:]}")
            time.sleep(0.005)
        self.address = json.loads(self._announcement.read_text())["address"]

    def restart(self, *options: str) -> None:
        """Kill it without mercy and start it again; options replace those that it was given."""
        self.kill()
        self._arguments.extend(options)
        self.process = self._spawn()
        self.wait_until_ready()

    def kill(self) -> None:
        """End it as `kill -9` does; harmless when repeated."""
        self.process.kill()
        self.process.wait(GUARD_S)

    def log(self) -> str:
        """Return what it wrote so far."""
        return self._log.read_text(errors="replace")


class ProxiedCluster:
    """Storage, control, an aggregator and workers; `cluster` is the interface to them."""

    def __init__(
        self, folder: Path, *, workers: int = 2, environment: Mapping[str, str] | None = None
    ) -> None:
        self.control_links: list[TcpProxy] = []
        self.workers: list[ServiceProcess] = []
        self._folder = folder
        self._count = workers
        kept = stores.kept(folder / "state")
        self._environment = {**kept.environment, **(environment or {})}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._start(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def cut_off(self, index: int) -> None:
        """Let nothing pass between one worker and the others, either way, until `heal`."""
        black_hole = Link(black_hole=True)
        self.control_links[index].disturb(both=black_hole)
        port = split_address(self.data_link.address)[1]
        process = psutil.Process(self.workers[index].process.pid)
        own = [
            each.laddr.port
            for each in process.net_connections("tcp")
            if each.raddr and each.raddr.port == port
        ]
        self.data_link.disturb(both=black_hole, client_ports=own)

    def heal(self) -> None:
        """End every disturbance of every link."""
        for link in self.links():
            link.heal()

    def links(self) -> list[TcpProxy]:
        """Return all proxies."""
        return [*self.control_links, self.data_link]

    def _start(self, stack: ExitStack) -> None:
        storage, control, aggregator = (f"127.0.0.1:{port}" for port in free_ports(3))
        self.data_link = stack.enter_context(TcpProxy(aggregator))
        self.storage = self._process(
            stack, "storage", "storage", "--listen", storage, "--state", str(self._folder / "state")
        )
        self.control = self._process(
            stack, "control", "coordinator", "control", "--listen", control, "--storage", storage
        )
        self.aggregator = self._process(
            stack,
            "aggregator",
            *("coordinator", "aggregator", "--listen", aggregator, "--control", control),
            *("--storage", storage, "--advertise", self.data_link.address),
        )
        for index in range(self._count):
            link = stack.enter_context(TcpProxy(control))
            self.control_links.append(link)
            self.workers.append(
                self._process(
                    stack,
                    f"worker-{index + 1}",
                    *("worker", "--control", link.address, "--storage", storage, "--slots", "1"),
                    *("--cache-dir", str(self._folder / f"cache-{index + 1}")),
                )
            )
        for process in (self.storage, self.control, self.aggregator, *self.workers):
            process.wait_until_ready()
        self.cluster = stack.enter_context(phalanx.connect(control))

    def _process(self, stack: ExitStack, id: str, *arguments: str) -> ServiceProcess:
        process = ServiceProcess(id, arguments, self._folder, self._environment)
        stack.callback(process.kill)
        return process
