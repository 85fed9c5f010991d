"""Which processes of a cluster can be harmed from this machine."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil

from phalanx.errors import FailedPrecondition
from phalanx.local.state import read_state
from phalanx.sdk.cluster import Cluster
from phalanx.v1.cluster_service_pb2 import GetClusterResponse, Worker


@dataclass(frozen=True)
class Victim:
    """A process that lives; ``metrics_address`` is empty where nobody tells it."""

    id: str
    role: str
    pid: int
    metrics_address: str = ""


class Victims(Protocol):
    """Where victims come from."""

    @property
    def roles(self) -> frozenset[str]:
        """The roles of which there can be any."""

    def living(self) -> list[Victim]:
        """Return the processes that live at the moment."""

    def all_up(self) -> bool:
        """Whether all processes are there again, as far as can be told from here."""


class LocalVictims:
    """The processes of a cluster that ``phalanx up`` or LocalCluster runs on this machine.

    Its supervisor starts again what dies.
    """

    roles = frozenset({"worker", "control", "aggregator", "storage"})

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir

    def living(self) -> list[Victim]:
        """Return the processes that live at the moment."""
        state = read_state(self._state_dir)
        if state is None:
            return []
        return [
            Victim(member.id, member.role, member.pid, member.metrics_address)
            for member in state.members
            if member.pid
        ]

    def all_up(self) -> bool:
        """Whether every process has said that it is ready."""
        state = read_state(self._state_dir)
        # A worker serves no clients and announces its metrics only.
        return state is not None and all(
            member.pid and (member.address or member.metrics_address) for member in state.members
        )


class HostVictims:
    """Workers and aggregators of any cluster that run on this host, by what they said of
    themselves.

    Whether they are started again is the business of whoever started them.
    """

    roles = frozenset({"worker", "aggregator"})

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._host = socket.gethostname()
        self._expected = len(self.living())

    def living(self) -> list[Victim]:
        """Return the processes that live at the moment."""
        return _on_host(self._cluster.describe(), self._host)

    def all_up(self) -> bool:
        """Whether there are as many as at the start."""
        return len(self.living()) >= self._expected


def victims_of(cluster: Cluster, state_dir: Path) -> Victims:
    """Return the processes of the cluster that can be reached from here.

    Raises FailedPrecondition when none of them runs on this machine.
    """
    state = read_state(state_dir)
    if state is not None and set(cluster.address.split(",")) <= set(state.address.split(",")):
        return LocalVictims(state_dir)
    found = HostVictims(cluster)
    if not found.living():
        hosts = sorted({worker.host for worker in cluster.describe().workers if worker.host})
        raise FailedPrecondition(
            f"no process of the cluster at {cluster.address} runs on this machine "
            f"({socket.gethostname()}); its workers are on {', '.join(hosts) or 'no machine'}: run "
            "`phalanx chaos` there, or name the state folder of `phalanx up` with --state",
            reason="NO_PROCESS_HERE",
        )
    return found


def _on_host(found: GetClusterResponse, host: str) -> list[Victim]:
    alive = (Worker.STATE_READY, Worker.STATE_SUSPECTED, Worker.STATE_DRAINING)
    told = [
        Victim(worker.id, "worker", worker.pid)
        for worker in found.workers
        if worker.host == host and worker.state in alive
    ]
    told += [
        Victim(each.id, "aggregator", each.pid)
        for each in found.aggregators
        if each.host == host and each.connected
    ]
    return [victim for victim in told if _is_ours(victim)]


def _is_ours(victim: Victim) -> bool:
    """Whether the number still means that process: another one, or one in another container with
    the same host name, must not be hit."""
    try:
        words = psutil.Process(victim.pid).cmdline()
    except psutil.Error:
        return False
    return victim.role in words
