"""The leaf server as the session process sees it: started, waited for, asked, replaced.

The first one is a fork of the session process, made before that has threads or connections; a later
one starts as a program of its own, which takes the time of some imports.

Nothing here waits for it: a server may hang, and the session process has heartbeats to send.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from setproctitle import getproctitle

from phalanx.blas import CUBLAS_ENVIRONMENT
from phalanx.blas import ENVIRONMENT as ONE_BLAS_THREAD
from phalanx.forking import client
from phalanx.keys.environment import without_secrets
from phalanx.telemetry.logs import get_logger
from worker.core.restarts import Restarts
from worker.leaf.server import READY, run

ANSWER_TIMEOUT_S = 5.0
"""A fork takes milliseconds. A server that is silent for so long is replaced."""
_READY_TIMEOUT_S = 60.0
"""Covers the imports on a slow disk."""
_ROOT = str(Path(__file__).resolve().parents[2])

_log = get_logger(__name__)

Answered = Callable[[dict[str, Any], list[int]], None]
"""Gets the answer and the handle that came with it; both empty: the server is gone."""


class LeafServer(client.ForkServer):
    """Starts leaf processes. Use it in one event loop, whose thread must outlive them."""

    def __init__(self) -> None:
        super().__init__(ANSWER_TIMEOUT_S)
        self._ready = False
        self._waiting: list[Callable[[], None]] = []
        self._restarts = Restarts()
        #: Starts in a row that came to nothing.
        self.failed_starts = 0
        self._timer: asyncio.TimerHandle | None = None
        # Requests that are not answered yet, in the order in which answers come.
        self._asked: deque[Answered] = deque()

    @classmethod
    def forked(cls) -> LeafServer:
        """Make one whose first process is a fork of this one, which must have one thread and no
        connection; where it has more, a program is started later instead."""
        made = cls()
        # A program may have other ideas: where SIGCHLD is ignored, the id of a child that ended is
        # free, and nobody gets its exit code.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _have_streams()
        if len(os.listdir("/proc/self/task")) == 1:
            # Where there is no memory or no process to be had, that is for the next one to find.
            with contextlib.suppress(OSError):
                made._start(_fork_this)
        return made

    @property
    def ready(self) -> bool:
        """Whether `start_leaf` may be called."""
        return self._ready and self._socket is not None

    def call_when_ready(self, callback: Callable[[], None]) -> None:
        """Call back from the event loop once it can fork, which takes until the server runs."""
        self._waiting.append(callback)
        if len(self._waiting) == 1:
            self._get_ready()

    def start_leaf(
        self,
        memory_limit_bytes: int,
        handles: Sequence[int],
        then: Callable[[client.ForkedProcess | None], None],
        gpus: Sequence[str] = (),
    ) -> None:
        """Fork a leaf process that gets these descriptors: standard output and error, its socket,
        its progress page. `then` gets it, or None where there is none, which is logged. It sees no
        GPUs but `gpus`."""

        def answered(answer: dict[str, Any], received: list[int]) -> None:
            process = None
            try:
                if answer:
                    process = self._forked(answer, received)
            except OSError as error:
                # No memory or no process to be had, most likely for a moment.
                _log.error("leaf_process_not_started", message=str(error))
            then(process)

        plan = {"memory_limit_bytes": memory_limit_bytes, "gpus": ",".join(gpus)}
        self._request({"fork": plan}, handles, answered)

    def collect_leaf(self, process: client.ForkedProcess, then: Callable[[int], None]) -> None:
        """Hand the exit code of a leaf process that has ended to `then`."""

        def answered(answer: dict[str, Any], _: list[int]) -> None:
            code = answer["code"] if answer else self.collect(process.pid, process.parent)
            then(process.ended(code))

        if process.parent is self._server:
            self._request({"collect": process.pid}, (), answered)
        else:
            answered({}, [])

    def forget(self) -> None:
        """Call nobody back any more, and end the server and all leaf processes at once."""
        self._waiting.clear()
        self._listen_no_more()
        self._ready = False
        if self._server is not None:
            # It has nothing to finish, and may be busy with imports.
            self._server.kill()
        self.close()
        self._answer_none()

    # Inside

    def _forget(self, pid: int) -> None:
        self._request({"collect": pid}, (), lambda _answer, _received: None)

    def _request(self, request: dict[str, Any], handles: Sequence[int], answered: Answered) -> None:
        if self._socket is None or self._server is None or not self._ready:
            asyncio.get_running_loop().call_soon(answered, {}, [])
            return
        # Whoever stopped it meant another one; waiting for it would cost all their lives.
        self._server.send_signal(signal.SIGCONT)
        self._asked.append(answered)
        try:
            client.send_request(self._socket, request, handles)
        except OSError as error:
            # It is gone, or so far behind that its socket is full.
            asyncio.get_running_loop().call_soon(self._lost, self._server, str(error))
            return
        if self._timer is None:
            self._expect_answer()

    def _expect_answer(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(
            ANSWER_TIMEOUT_S, self._lost, self._server, f"no answer within {ANSWER_TIMEOUT_S:g} s"
        )

    def _get_ready(self) -> None:
        self._timer = None
        if not self._waiting:
            return
        try:
            if self._socket is None:
                self._start(_start_program)
        except OSError as error:
            # No memory or no process to be had, most likely for a moment.
            self._failed(str(error))
            return
        assert self._socket is not None
        self._socket.setblocking(False)
        loop = asyncio.get_running_loop()
        loop.add_reader(self._socket, self._heard)
        self._timer = loop.call_later(_READY_TIMEOUT_S, self._failed, "it is not ready in time")

    def _heard(self) -> None:
        if self._ready:
            self._heard_answer()
            return
        assert self._socket is not None
        heard = b""
        with contextlib.suppress(OSError):
            heard = self._socket.recv(len(READY))
        if heard != READY:
            self._failed("it has ended")
            return
        self._wait_no_more()
        self._ready = True
        self.failed_starts = 0
        waiting, self._waiting = self._waiting, []
        for callback in waiting:
            callback()

    def _heard_answer(self) -> None:
        assert self._socket is not None
        try:
            answer, received = client.receive_answer(self._socket)
        except BlockingIOError:
            return
        except OSError:
            answer, received = {}, []
        if not answer:
            self._lost(self._server, "it has ended")
            return
        self._wait_no_more()
        answered = self._asked.popleft()
        if self._asked:
            self._expect_answer()
        answered(answer, received)

    def _lost(self, server: client.ServerProcess | None, why: str) -> None:
        """The server that was ready is of no use any more: the next one starts when it is asked
        for. What it had started dies with it."""
        if server is not self._server or server is None:
            return
        _log.error("leaf_server_lost", message=why)
        self._end()
        self._answer_none()

    def _failed(self, why: str) -> None:
        _log.error("leaf_server_not_started", message=why)
        self.failed_starts += 1
        self._end()
        wait_s = self._restarts.wait_after_death(time.monotonic())
        self._timer = asyncio.get_running_loop().call_later(wait_s, self._get_ready)

    def _answer_none(self) -> None:
        asked, self._asked = self._asked, deque()
        for answered in asked:
            answered({}, [])

    def _end(self) -> None:
        """End the server without waiting for its end: asleep in the kernel it does not hear."""
        self._listen_no_more()
        self._ready = False
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        server, self._server = self._server, None
        if server is not None:
            server.kill()
            _bury(server)

    def _listen_no_more(self) -> None:
        self._wait_no_more()
        if self._socket is not None:
            # Before there was a loop nobody listened.
            with contextlib.suppress(RuntimeError):
                asyncio.get_running_loop().remove_reader(self._socket)

    def _wait_no_more(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _bury(server: client.ServerProcess) -> None:
    """Collect a server that was killed, once it has ended."""
    try:
        handle = os.pidfd_open(server.pid)
    except OSError:
        return  # Collected already, or no descriptor is free: then it stays among the processes.
    loop = asyncio.get_running_loop()

    def collect() -> None:
        loop.remove_reader(handle)
        os.close(handle)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(0)

    loop.add_reader(handle, collect)


def _have_streams() -> None:
    """Open those of the three streams that this process was started without: what takes their
    numbers otherwise would be handed on as such."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def _start_program(_ours: socket.socket, theirs: socket.socket) -> client.ServerProcess:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "worker.leaf", str(os.getpid())],
        stdin=theirs.fileno(),
        stdout=subprocess.DEVNULL,
        env=_environment(os.environ),
        start_new_session=True,
    )


def _fork_this(ours: socket.socket, theirs: socket.socket) -> client.ServerProcess:
    session_pid = os.getpid()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    pid = os.fork()
    if pid == 0:
        _be_a_program(ours, theirs, session_pid)
    return _Child(pid)


class _Child:
    """A forked process, with the methods of `subprocess.Popen` that matter here."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._code: int | None = None

    def send_signal(self, sig: int, /) -> None:
        if self._code is None:
            # It is not collected, so the id is still its own.
            os.kill(self.pid, sig)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        if self._code is None:
            if timeout is not None and not self._ends_within(timeout):
                raise subprocess.TimeoutExpired("leaf server", timeout)
            _, status = os.waitpid(self.pid, 0)
            self._code = os.waitstatus_to_exitcode(status)
        return self._code

    def _ends_within(self, timeout_s: float) -> bool:
        handle = os.pidfd_open(self.pid)
        try:
            poller = select.poll()
            poller.register(handle, select.POLLIN)
            return bool(poller.poll(timeout_s * 1000))
        finally:
            os.close(handle)


def _be_a_program(ours: socket.socket, theirs: socket.socket, session_pid: int) -> NoReturn:
    """Make the fork what `_start_program` starts, and run it."""
    try:
        os.setsid()
        ours.detach()
        os.dup2(theirs.detach(), 0)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        for number in map(int, os.listdir("/proc/self/fd")):
            if number > 2:
                with contextlib.suppress(OSError):  # that of the folder just listed
                    os.close(number)
        # The title's place is found by the first variable, so before that one is changed.
        getproctitle()
        changed = _environment(os.environ)
        for name in {*os.environ} - {*changed}:
            del os.environ[name]
        os.environ.update(changed)
        if not sys.flags.safe_path and sys.path[0] != _ROOT:
            del sys.path[0]
        if _ROOT not in sys.path:
            sys.path.insert(0, _ROOT)
        run(socket.socket(fileno=0), session_pid)
    finally:
        os._exit(1)


def _environment(parent: Mapping[str, str]) -> dict[str, str]:
    # Python finds this very code, wherever the session process was started from.
    paths = [_ROOT, *filter(None, [parent.get("PYTHONPATH")])]
    exact = {**ONE_BLAS_THREAD, **CUBLAS_ENVIRONMENT, "NUMEXPR_NUM_THREADS": "1"}
    return {**without_secrets(parent), **exact, "PYTHONPATH": os.pathsep.join(paths)}
