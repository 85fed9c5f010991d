"""One leaf process as the session process sees it: start, talk, watch, kill."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

from phalanx.forking.client import ForkedProcess
from phalanx.telemetry.logs import get_logger
from worker import ipc
from worker.ipc import ConnectionClosed, Kind, Message
from worker.memory import ProgressPage
from worker.session.leaf_server import LeafServer
from worker.session.sending import SocketSender

_LOG_READ_BYTES = 65_536
_LAST_READS_MAX = 64
_OOM_EVENTS = Path("/sys/fs/cgroup/memory.events")

_log = get_logger(__name__)


class LeafProcess:
    """A leaf process, from the request for it on. Made in the event loop's thread, with a leaf
    server that is ready. What is sent to it before it runs waits for it.

    Raises OSError where there is no descriptor for it; then nothing of it is left. One that the
    server cannot start ends as if its server had died.

    `on_message(process, message)` gets what it says, `on_log(process, level, data)` what it prints
    and `on_exit(process, code)` its end, once and last. It sees no GPUs but `gpus`.
    """

    def __init__(
        self,
        leaves: LeafServer,
        memory_limit_bytes: int,
        on_message: Callable[[LeafProcess, Message], None],
        on_log: Callable[[LeafProcess, str, bytes], None],
        on_exit: Callable[[LeafProcess, int], None],
        gpus: Sequence[str] = (),
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
        self._leaves = leaves
        self._process: ForkedProcess | None = None
        self._killed = False
        self._logs: dict[int, str] = {}
        with contextlib.ExitStack() as unmade:
            unmade.callback(self.page.close)
            self._socket, child = socket.socketpair()
            unmade.callback(self._socket.close)
            unmade.callback(self._close_logs)
            self._spawn(leaves, child, memory_limit_bytes, gpus)
            unmade.pop_all()
        self._socket.setblocking(False)
        self._sender = SocketSender(self._loop, self._socket)
        self._loop.add_reader(self._socket, self._readable)

    @property
    def pid(self) -> int:
        """Its process id; 0: it does not run yet."""
        return self._process.pid if self._process is not None else 0

    def send(self, kind: Kind, body: bytes = b"", fds: tuple[int, ...] = ()) -> None:
        """Send a message; what the socket does not take at once follows as soon as it does."""
        self._sender.send(ipc.frame(kind, body), fds)

    def kill(self) -> None:
        """End the process and whatever it started, at once; `on_exit` follows."""
        self._killed = True
        if self._process is not None:
            self._process.kill_group()

    def hung(self) -> None:
        """Kill it for not making progress."""
        self.killed_as_hung = True
        self.kill()

    def was_out_of_memory(self, code: int) -> bool:
        """Whether its end was the kernel's way of making room."""
        return code == -signal.SIGKILL and _oom_kills() > self._oom_kills

    @property
    def orphaned(self) -> bool:
        """Whether its end was that of the process that had started it, or was to start it."""
        return self._process is None or self._process.orphaned

    # Inside

    def _spawn(
        self,
        leaves: LeafServer,
        child: socket.socket,
        memory_limit_bytes: int,
        gpus: Sequence[str],
    ) -> None:
        with child, contextlib.ExitStack() as writers:
            outputs = []
            for level in ("info", "error"):
                reader, writer = os.pipe()
                writers.callback(os.close, writer)
                outputs.append(writer)
                os.set_blocking(reader, False)
                self._logs[reader] = level
                self._loop.add_reader(reader, self._printed, reader)
            handles = [*outputs, child.fileno(), self.page.fd]
            leaves.start_leaf(memory_limit_bytes, handles, self._started, gpus)

    def _started(self, process: ForkedProcess | None) -> None:
        if process is None:
            self._finish(-signal.SIGKILL)
            return
        self._process = process
        self._loop.add_reader(process.handle, self._exited)
        if self._killed:
            self.kill()

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
        assert self._process is not None
        self._loop.remove_reader(self._process.handle)
        for take in (self._last_messages, self.kill, self._last_prints):
            try:
                take()
            except Exception:  # noqa: BLE001 - a slot whose process has no end is lost for good
                _log.exception("last_words_of_leaf_process_lost", pid=self.pid)
        self._leaves.collect_leaf(self._process, self._finish)

    def _finish(self, code: int) -> None:
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


def _oom_kills() -> int:
    """Processes of this control group that the kernel killed for memory; 0 where not known."""
    with contextlib.suppress(OSError, ValueError):
        for line in _OOM_EVENTS.read_text().splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
    return 0
