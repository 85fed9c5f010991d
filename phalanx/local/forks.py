"""Members as forks of one server process: how they are started, signalled and collected."""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from phalanx.blas import ENVIRONMENT as ONE_BLAS_THREAD
from phalanx.local.fork_server import REQUEST_LIMIT_BYTES

ANSWER_TIMEOUT_S = 30.0
"""Covers the imports of all members on a slow disk."""
_STOP_S = 3.0


class ForkServer:
    """Starts member processes. Not thread-safe; the operating system ends all of them, and the
    server, when the thread that started the first one ends."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        # BLAS reads these when NumPy is imported, which happens in the server.
        self._environment = {**environment, **ONE_BLAS_THREAD}
        self._server: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def fork(
        self, module: str, arguments: Sequence[str], *, imports: Sequence[str], cwd: Path, log: int
    ) -> "ForkedProcess":
        """Start ``python -P -m module arguments --parent-pid PID`` with its output into ``log``.

        ``imports`` are modules that the server loads before. Raises OSError where there is no
        memory or no process slot, and where the server is dead: the next call starts a new one.
        """
        if self._server is None:
            self._start_server(log)
        plan = {
            "module": module,
            "arguments": list(arguments),
            "imports": list(imports),
            "cwd": str(cwd),
        }
        answer, handles = self._ask({"fork": plan}, [log])
        if "errno" in answer:
            raise OSError(answer["errno"], os.strerror(answer["errno"]))
        assert self._server is not None
        return ForkedProcess(answer["pid"], handles[0], self, self._server)

    def collect(self, pid: int, parent: subprocess.Popen[bytes]) -> int:
        """Return the exit code of a process that has ended; negative: the signal that killed it."""
        # A server that has been replaced is gone, and with it everything that it had started; its
        # successor knows nothing of those, or another process by that id.
        if parent is self._server:
            with contextlib.suppress(OSError):
                return int(self._ask({"collect": pid}, [])[0]["code"])
        return -signal.SIGKILL

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
                self._server.wait()
            self._server = None

    def _start_server(self, log: int) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(ANSWER_TIMEOUT_S)
        # It has all three streams, also where this program has none: members inherit them. What it
        # has to complain of is in the log of the first member that it was to start.
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, "-P", "-m", "phalanx.local.fork_server", str(os.getpid())],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=log,
                env=self._environment,
                start_new_session=True,
            )
        self._socket = ours

    def _ask(self, request: dict[str, Any], handles: list[int]) -> tuple[dict[str, Any], list[int]]:
        if self._socket is None:
            raise OSError("the process that starts the members has ended")
        if self._server is not None:
            # Whoever stopped it meant a member; waiting for it would cost them all their lives.
            self._server.send_signal(signal.SIGCONT)
        try:
            socket.send_fds(self._socket, [json.dumps(request).encode()], handles)
            answer, received, _, _ = socket.recv_fds(
                self._socket, REQUEST_LIMIT_BYTES, 1, socket.MSG_CMSG_CLOEXEC
            )
        except OSError:
            answer, received = b"", []
        if not answer:
            if self._server is not None:
                self._server.kill()
            self.close()
            raise OSError("the process that starts the members has ended")
        return json.loads(answer), received


class ForkedProcess:
    """One process, by a handle that never comes to mean another one."""

    def __init__(
        self, pid: int, handle: int, server: ForkServer, parent: subprocess.Popen[bytes]
    ) -> None:
        self.pid = pid
        self.handle = handle
        """Readable once the process has ended."""
        self._server = server
        self._parent = parent
        self._code: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs."""
        if self._code is None and self.wait(0):
            self._code = self._server.collect(self.pid, self._parent)
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
