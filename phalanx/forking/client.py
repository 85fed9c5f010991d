"""The side that asks: how forked processes are started, signalled and collected."""

import contextlib
import errno
import json
import os
import select
import signal
import socket
import subprocess
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from phalanx.forking.server import REQUEST_LIMIT_BYTES, Plan

_STOP_S = 3.0


class ServerProcess(Protocol):
    """The process that forks, as the one that started it sees it."""

    @property
    def pid(self) -> int:
        """Its process id."""

    def send_signal(self, sig: int, /) -> None:
        """Send a signal; nothing happens once it was waited for."""

    def kill(self) -> None:
        """Send SIGKILL."""

    def wait(self, timeout: float | None = None) -> int:
        """Return its exit code. Raises subprocess.TimeoutExpired."""


class ForkServer:
    """Has a server process fork. Not thread-safe."""

    def __init__(self, answer_timeout_s: float) -> None:
        self._answer_timeout_s = answer_timeout_s
        self._server: ServerProcess | None = None
        self._socket: socket.socket | None = None

    def collect(self, pid: int, parent: ServerProcess) -> int | None:
        """Return the exit code of a process that has ended, negative: the signal that killed it;
        None: its server is gone, which ended it."""
        # A server that has been replaced is gone, and with it everything that it had started; its
        # successor knows nothing of those, or another process by that id.
        if parent is self._server:
            with contextlib.suppress(OSError):
                return int(self._ask({"collect": pid}, [])[0]["code"])
        # Where this is the first process of a container, orphans became its own.
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
        return None

    def close(self) -> None:
        """End the server, and with it what it started and still runs."""
        if self._socket is not None:
            # Closing is not enough where a fork of this program holds a copy.
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            self._socket.close()
            self._socket = None
        if self._server is not None:
            try:
                self._server.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                self._server.kill()
                # Asleep in the kernel it may not hear it at once; it can do nothing more either.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._server.wait(_STOP_S)
            self._server = None

    def _start(self, launch: Callable[[socket.socket, socket.socket], ServerProcess]) -> None:
        """Start a server: ``launch`` gets our end of its socket, then its own."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                self._server = launch(ours, theirs)
            except BaseException:
                ours.close()
                raise
        ours.settimeout(self._answer_timeout_s)
        self._socket = ours

    def _fork(self, plan: Plan, handles: Sequence[int]) -> "ForkedProcess":
        """Have a process forked. Raises OSError where there is no memory or no process slot, and
        where the server is dead: it is closed then."""
        return self._forked(*self._ask({"fork": plan}, handles))

    def _forked(self, answer: dict[str, Any], received: Sequence[int]) -> "ForkedProcess":
        """Make a process of the server's answer. Raises OSError where that tells of none."""
        if "errno" in answer:
            raise OSError(answer["errno"], os.strerror(answer["errno"]))
        assert self._server is not None
        pid = answer["pid"]
        if not received:
            # No descriptor is free here. The process is not collected: the id is still its own.
            os.kill(pid, signal.SIGKILL)
            self._forget(pid)
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return ForkedProcess(pid, received[0], self, self._server)

    def _forget(self, pid: int) -> None:
        """Collect a process that was killed, whatever its exit code."""
        assert self._server is not None
        self.collect(pid, self._server)

    def _ask(
        self, request: dict[str, Any], handles: Sequence[int]
    ) -> tuple[dict[str, Any], list[int]]:
        if self._socket is None:
            raise OSError("the process that starts others has ended")
        if self._server is not None:
            # Whoever stopped it meant another one; waiting for it would cost all their lives.
            self._server.send_signal(signal.SIGCONT)
        try:
            send_request(self._socket, request, handles)
            answer, received = receive_answer(self._socket)
        except OSError:
            answer, received = {}, []
        if not answer:
            if self._server is not None:
                self._server.kill()
            self.close()
            raise OSError("the process that starts others has ended")
        return answer, received


def send_request(to: socket.socket, request: dict[str, Any], handles: Sequence[int]) -> None:
    """Send a server a request. Raises OSError."""
    socket.send_fds(to, [json.dumps(request).encode()], handles)


def receive_answer(server: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Return the next answer, empty where the server is gone, and the handle that came with it.
    Raises OSError."""
    answer, received, _, _ = socket.recv_fds(
        server, REQUEST_LIMIT_BYTES, 1, socket.MSG_CMSG_CLOEXEC
    )
    return json.loads(answer) if answer else {}, received


class ForkedProcess:
    """One process, by a handle that never comes to mean another one."""

    def __init__(self, pid: int, handle: int, server: ForkServer, parent: ServerProcess) -> None:
        self.pid = pid
        self.handle = handle
        """Readable once the process has ended."""
        self.orphaned = False
        """Whether it was its server's death that ended it."""
        self.parent = parent
        """The server's process that forked it."""
        self._server = server
        self._code: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs."""
        if self._code is None and self.wait(0):
            self.ended(self._server.collect(self.pid, self.parent))
        return self._code

    def ended(self, code: int | None) -> int:
        """Note its end, once; return its exit code. None: its server is gone, which ended it."""
        self.orphaned = code is None
        self._code = -signal.SIGKILL if code is None else code
        os.close(self.handle)
        return self._code

    def wait(self, timeout_s: float) -> bool:
        """Return whether it ended within a time."""
        if self._code is not None:
            return True
        poller = select.poll()
        poller.register(self.handle, select.POLLIN)
        return bool(poller.poll(timeout_s * 1000))

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens once it has ended."""
        if self._code is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.handle, number)

    def kill_group(self) -> None:
        """Kill it and what it started; nothing happens once its end was collected."""
        if self._code is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            # Just forked, it may not have its group yet.
            self.send_signal(signal.SIGKILL)
