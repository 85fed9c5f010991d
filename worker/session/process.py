"""One leaf process as the session process sees it: start, talk, watch, kill."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from phalanx.telemetry.logs import get_logger
from worker import ipc
from worker.ipc import ConnectionClosed, Kind, Message
from worker.memory import ProgressPage
from worker.session.sending import SocketSender

SINGLE_THREAD = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "BLIS_NUM_THREADS": "1",
    "NUMEXPR_NUM_THREADS": "1",
    "VECLIB_MAXIMUM_THREADS": "1",
}
"""Numeric libraries read these when they are loaded; more threads would give other bits."""

_LOG_READ_BYTES = 65_536
_LAST_READS_MAX = 64
_OOM_EVENTS = Path("/sys/fs/cgroup/memory.events")

_log = get_logger(__name__)


class LeafProcess:
    """A running leaf process. Made in the event loop's thread, which must outlive it.

    Raises OSError where it cannot be started; then nothing of it is left.

    `on_message(process, message)` gets what it says, `on_log(process, level, data)` what it prints
    and `on_exit(process, code)` its end, once and last.
    """

    def __init__(
        self,
        memory_limit_bytes: int,
        on_message: Callable[[LeafProcess, Message], None],
        on_log: Callable[[LeafProcess, str, bytes], None],
        on_exit: Callable[[LeafProcess, int], None],
    ) -> None:
        self.page = ProgressPage.create()
        self.ready = False
        self.known_jobs: set[int] = set()
        self.killed_as_hung = False
        self._on_message = on_message
        self._on_log = on_log
        self._on_exit = on_exit
        self._loop = asyncio.get_running_loop()
        self._assembler = ipc.Assembler()
        self._oom_kills = _oom_kills()
        self._logs: dict[int, str] = {}
        with contextlib.ExitStack() as unmade:
            unmade.callback(self.page.close)
            self._socket, child = socket.socketpair()
            unmade.callback(self._socket.close)
            unmade.callback(self._close_logs)
            self._popen = self._spawn(child, memory_limit_bytes)
            self.pid = self._popen.pid
            unmade.callback(self._popen.wait)
            unmade.callback(self.kill)
            self._pidfd = os.pidfd_open(self.pid)
            unmade.pop_all()
        self._socket.setblocking(False)
        self._sender = SocketSender(self._loop, self._socket)
        self._loop.add_reader(self._socket, self._readable)
        self._loop.add_reader(self._pidfd, self._exited)

    def send(self, kind: Kind, body: bytes = b"", fds: tuple[int, ...] = ()) -> None:
        """Send a message; what the socket does not take at once follows as soon as it does."""
        self._sender.send(ipc.frame(kind, body), fds)

    def kill(self) -> None:
        """End the process and whatever it started, at once; `on_exit` follows."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def hung(self) -> None:
        """Kill it for not making progress."""
        self.killed_as_hung = True
        self.kill()

    def was_out_of_memory(self, code: int) -> bool:
        """Whether its end was the kernel's way of making room."""
        return code == -signal.SIGKILL and _oom_kills() > self._oom_kills

    # Inside

    def _spawn(self, child: socket.socket, memory_limit_bytes: int) -> subprocess.Popen[bytes]:
        with child, contextlib.ExitStack() as writers:
            outputs = []
            for level in ("info", "error"):
                reader, writer = os.pipe()
                writers.callback(os.close, writer)
                outputs.append(writer)
                os.set_blocking(reader, False)
                self._logs[reader] = level
                self._loop.add_reader(reader, self._printed, reader)
            return subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "worker.leaf",
                    str(child.fileno()),
                    str(self.page.fd),
                    str(os.getpid()),
                    str(memory_limit_bytes),
                ],
                stdin=subprocess.DEVNULL,
                stdout=outputs[0],
                stderr=outputs[1],
                pass_fds=(child.fileno(), self.page.fd),
                env=_environment(os.environ),
                start_new_session=True,
            )

    def _readable(self) -> None:
        try:
            messages = self._assembler.feed(*ipc.receive_some(self._socket))
        except BlockingIOError:
            return
        except ConnectionClosed:
            self._loop.remove_reader(self._socket)
            return
        except ValueError:
            # Only code that meddles with the socket can cause it.
            self._loop.remove_reader(self._socket)
            self.kill()
            return
        for message in messages:
            self._on_message(self, message)

    def _printed(self, reader: int) -> None:
        try:
            data = os.read(reader, _LOG_READ_BYTES)
        except BlockingIOError:
            return
        if data:
            self._on_log(self, self._logs[reader], data)
        else:
            self._close_log(reader)

    def _close_log(self, reader: int) -> None:
        if self._logs.pop(reader, None) is not None:
            self._loop.remove_reader(reader)
            os.close(reader)

    def _close_logs(self) -> None:
        for reader in list(self._logs):
            self._close_log(reader)

    def _exited(self) -> None:
        """Take what it still said and printed, then report its end."""
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        for take in (self._last_messages, self.kill, self._last_prints):
            try:
                take()
            except Exception:  # noqa: BLE001 - a slot whose process has no end is lost for good
                _log.exception("last_words_of_leaf_process_lost", pid=self.pid)
        code = self._popen.wait()
        self._close_logs()
        self._sender.close()
        self._loop.remove_reader(self._socket)
        self._socket.close()
        try:
            self._on_exit(self, code)
        finally:
            self.page.close()

    def _last_messages(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionClosed):
            while True:
                for message in self._assembler.feed(*ipc.receive_some(self._socket)):
                    self._on_message(self, message)

    def _last_prints(self) -> None:
        """Take what is in the pipes, but not for ever: who left the group may still write."""
        for reader, level in list(self._logs.items()):
            with contextlib.suppress(BlockingIOError):
                for _ in range(_LAST_READS_MAX):
                    if not (data := os.read(reader, _LOG_READ_BYTES)):
                        break
                    self._on_log(self, level, data)


def describe_exit(code: int) -> str:
    """How a process ended, for people."""
    if code >= 0:
        return f"exit status {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"


def _environment(parent: Mapping[str, str]) -> dict[str, str]:
    # Python finds this very code, wherever the session process was started from.
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, [parent.get("PYTHONPATH")])]
    return {**parent, **SINGLE_THREAD, "PYTHONPATH": os.pathsep.join(paths)}


def _oom_kills() -> int:
    """Processes of this control group that the kernel killed for memory; 0 where not known."""
    with contextlib.suppress(OSError, ValueError):
        for line in _OOM_EVENTS.read_text().splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
    return 0
