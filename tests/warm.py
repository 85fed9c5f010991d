"""A process that has loaded what members of a cluster need, and forks fork servers of clusters.

Tests start over a hundred clusters, and each of them would import the same code again: more than
half of what starting it costs. What a cluster does from its fork server on is the same.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from setproctitle import getproctitle

from phalanx.blas import ENVIRONMENT as ONE_BLAS_THREAD
from phalanx.forking import client
from phalanx.forking.client import ForkedProcess
from phalanx.forking.server import print_to, serve
from phalanx.local import fork_server, forks
from phalanx.local.layout import IMPORTS

ANSWER_TIMEOUT_S = 60.0


class _Started:
    """A forked fork server, as `client.ServerProcess`."""

    def __init__(self, process: ForkedProcess, lock: threading.Lock) -> None:
        self.pid = process.pid
        self._process = process
        self._lock = lock

    def send_signal(self, number: Any) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        self._process.kill_group()

    def wait(self, timeout: float | None = None) -> int:
        if not self._process.wait(ANSWER_TIMEOUT_S if timeout is None else timeout):
            raise subprocess.TimeoutExpired("fork server", timeout or ANSWER_TIMEOUT_S)
        with self._lock:
            code = self._process.poll()
        assert code is not None
        return code


class WarmServer(client.ForkServer):
    """Starts fork servers. Its process ends once nobody can ask it any more."""

    def __init__(self) -> None:
        super().__init__(ANSWER_TIMEOUT_S)
        self._lock = threading.Lock()
        self._start(
            lambda _, theirs: subprocess.Popen(
                [sys.executable, "-P", str(Path(__file__))],
                stdin=theirs.fileno(),
                env={**os.environ, **ONE_BLAS_THREAD},
                start_new_session=True,
            )
        )

    def start(self, theirs: socket.socket, log: int, environment: Mapping[str, str]) -> _Started:
        """Fork a server that answers on a socket."""
        plan = {"environment": dict(environment)}
        with self._lock:
            return _Started(self._fork(plan, [theirs.fileno(), log]), self._lock)


@contextlib.contextmanager
def warm_clusters(warm: WarmServer) -> Iterator[None]:
    """Have the clusters of this process start from loaded code, for as long as the block runs."""
    start_cold = forks.ForkServer._start_server

    def start(server: forks.ForkServer, log: int) -> None:
        environment = server._environment
        # What Python reads at its start cannot be changed later.
        if _of_python(environment) != _of_python(os.environ):
            start_cold(server, log)
            return
        server._start(lambda _, theirs: warm.start(theirs, log, environment))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forks.ForkServer, "_start_server", start)
        yield


def _of_python(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith("PYTHON")}


def main() -> None:
    """Load everything and serve; in a forked process, be the fork server of a cluster."""
    if os.fork() != 0:
        os._exit(0)  # so that tests which count the children of their process do not count this one
    for name in sorted({name for names in IMPORTS.values() for name in names}):
        importlib.import_module(name)
    getproctitle()  # once, before the environment moves: titles are written where it was
    warm_pid = os.getpid()
    forked = serve(socket.socket(fileno=sys.stdin.fileno()))
    if forked is not None:
        plan, (requests, log) = forked
        os.environ.clear()
        os.environ.update(plan["environment"])
        os.dup2(requests, 0)
        os.close(requests)
        print_to(os.open(os.devnull, os.O_WRONLY), log)
        fork_server.main([str(warm_pid)])


if __name__ == "__main__":
    main()
