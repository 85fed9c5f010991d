"""Processes that make chunks, as storage sees them: started when needed, replaced when they die."""

import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phalanx.data.linked_files import AWAY
from phalanx.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    PhalanxError,
    Unavailable,
)
from phalanx.keys.environment import without_secrets
from phalanx.telemetry.logs import get_logger
from storage.links import messages

ANSWER_TIMEOUT_S = 300.0
"""A chunk that takes longer is not made: its file is on a disk that hangs, or was made to hang."""

END_S = 1.0
"""How long a process is waited for that was killed, or dies by itself; no lock is held meanwhile.
One that waits for a disk, from which no signal wakes it, is left to end when it may."""

_DYING_FOR_EACH = 2
"""So many processes may be left so, for each that runs: they may keep their memory."""

_CRASHES = frozenset({signal.SIGSEGV, signal.SIGFPE, signal.SIGILL})
"""What a process dies of by what it reads. An abort may be for want of memory."""

PROGRAM = (sys.executable, "-P", "-m", "storage.links")
_ROOT = str(Path(__file__).resolve().parents[2])
_log = get_logger(__name__)


@dataclass(frozen=True)
class Plan:
    """What all chunks of a data set are made by; ``digest`` is that of ``content``.

    ``files`` names what is read, for messages.
    """

    digest: str
    content: bytes
    files: str


class _Process:
    """One process and the socket to it. Not thread-safe."""

    def __init__(self, command: Sequence[str]) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=theirs.fileno(),
                    # Whatever a library says must not come between the messages.
                    stdout=subprocess.DEVNULL,
                    env=_environment(os.environ),
                    start_new_session=True,
                )
            except BaseException:
                ours.close()
                raise
        self._socket = ours

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, header: Mapping[str, Any], plan: Plan, timeout_s: float) -> messages.Message:
        """Return the answer. Raises OSError where the process is gone, TimeoutError."""
        self._socket.settimeout(timeout_s)
        answer = self._once({**header, "plan": plan.digest}, b"")
        if "wants" in answer[0]:
            answer = self._once({**header, "plan": plan.digest}, plan.content)
        return answer

    def stop(self) -> None:
        """Kill it, which loses nothing, and wait for nothing; whoever is asking it gets OSError."""
        self._process.kill()
        # One that waits for a disk dies when the disk answers.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def ended(self, timeout_s: float) -> int | None:
        """Return its exit code, or None if it has not ended in that time."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def close(self) -> None:
        """Close the socket, once nobody asks any more."""
        self._socket.close()

    def _once(self, header: Mapping[str, Any], body: bytes) -> messages.Message:
        messages.send(self._socket, header, body)
        answer = messages.receive(self._socket)
        if answer is None:
            raise OSError("the process that makes chunks has ended")
        return answer


class Makers:
    """At most ``processes`` of them, each with one request at a time; others wait for one."""

    def __init__(
        self,
        roots: Sequence[str],
        processes: int,
        *,
        program: Sequence[str] = PROGRAM,
        timeout_s: float = ANSWER_TIMEOUT_S,
    ) -> None:
        self._command = [*program, *roots]
        self._timeout_s = timeout_s
        #: None stands for one that is not started.
        self._free: queue.LifoQueue[_Process | None] = queue.LifoQueue()
        for _ in range(processes):
            self._free.put(None)
        self._mutex = threading.Lock()
        self._running: set[_Process] = set()
        #: Killed, and not dead yet: they are looked at again before another one is started.
        self._dying: list[_Process] = []
        self._dying_max = _DYING_FOR_EACH * processes
        self._closed = False

    def check(self, plan: Plan, first: int, stop: int) -> None:
        """Look whether files [first, stop) of a plan can be read; raises as ``make`` does."""
        self._ask({"do": "check", "first": first, "stop": stop}, plan)

    def make(self, plan: Plan, split: str, first: int, stop: int) -> bytes:
        """Return the bytes of a chunk, whether or not they are what they were.

        Raises FailedPrecondition where its files are not what they were, or crash whoever parses
        them; DeadlineExceeded, and Unavailable for all that may pass.
        """
        _, body = self._ask({"do": "make", "split": split, "first": first, "stop": stop}, plan)
        return body

    def pids(self) -> list[int]:
        """Return the ids of the processes that run."""
        with self._mutex:
            return [process.pid for process in self._running]

    def end(self) -> None:
        """End all processes, now and for good; whoever asks one gets Unavailable."""
        with self._mutex:
            self._closed = True
            running = list(self._running)
        for process in running:
            process.stop()

    def close(self) -> None:
        """Let go of what is left of them, once nobody asks any more."""
        self.end()
        with self._mutex:
            running = list(self._running)
            self._running.clear()
        for process in running:
            self._bury(process)

    def _ask(self, header: Mapping[str, Any], plan: Plan) -> messages.Message:
        process = self._free.get()
        try:
            # One that had died meanwhile is told from one that died of this.
            for is_last in (False, True):
                if process is None:
                    process = self._start()
                try:
                    answer = process.ask(header, plan, self._timeout_s)
                except (OSError, ValueError) as error:
                    gone, process = process, None
                    code = self._forget(gone, is_silent=isinstance(error, TimeoutError))
                    _log.warning("link_reader_lost", pid=gone.pid, code=code, error=str(error))
                    self._explain(error, code, plan, is_last)
                    continue
                return _checked(answer)
            raise AssertionError("the last attempt returns or raises")
        finally:
            self._free.put(process)

    def _explain(self, error: Exception, code: int | None, plan: Plan, is_last: bool) -> None:
        """Raise what a lost process means, unless it is worth another attempt."""
        if self._closed:
            raise Unavailable("the storage service stops", reason="STOPPING") from error
        if isinstance(error, TimeoutError):
            raise DeadlineExceeded(
                f"reading {plan.files} took longer than {self._timeout_s:g} s",
                reason="LINKED_FILE_SLOW",
            ) from error
        if is_last and code is not None and -code in _CRASHES:
            raise FailedPrecondition(
                f"the process that reads {plan.files} crashed twice, with {code}: "
                "a file is damaged",
                reason="LINKED_FILE_DEADLY",
            ) from error
        if is_last:
            # Whoever has it killed, mostly for want of memory, says nothing of the file.
            raise Unavailable(
                f"the process that reads {plan.files} ended twice, with {code}: there may be less "
                "memory than it takes",
                reason=AWAY,
            ) from error

    def _start(self) -> _Process:
        with self._mutex:
            if self._closed:
                raise Unavailable("the storage service stops", reason="STOPPING")
            self._dying = [process for process in self._dying if process.ended(0) is None]
            if len(self._dying) >= self._dying_max:
                raise Unavailable(
                    f"{len(self._dying)} processes that read linked files wait for a disk that "
                    "does not answer, and cannot even end",
                    reason=AWAY,
                )
            try:
                process = _Process(self._command)
            except OSError as error:
                raise Unavailable(
                    f"no process can be started to read linked files ({error.strerror})",
                    reason="NO_PROCESS",
                ) from error
            self._running.add(process)
        _log.info("link_reader_started", pid=process.pid)
        return process

    def _forget(self, process: _Process, *, is_silent: bool) -> int | None:
        """Have done with a process; return its exit code if it has one."""
        with self._mutex:
            self._running.discard(process)
        # What it dies of by itself is told by its code, which a signal would replace.
        code = None if is_silent else process.ended(END_S)
        if code is None:
            return self._bury(process)
        process.close()
        return code

    def _bury(self, process: _Process) -> int | None:
        process.stop()
        code = process.ended(END_S)
        process.close()
        if code is None:
            _log.warning("link_reader_does_not_end", pid=process.pid)
            with self._mutex:
                self._dying.append(process)
        return code


def _checked(answer: messages.Message) -> messages.Message:
    error = answer[0].get("error")
    if error is not None:
        kind = Unavailable if answer[0]["passes"] else FailedPrecondition
        raise kind(str(error), reason=str(answer[0]["reason"]))
    return answer


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    # Python finds this very code, wherever the service was started from.
    paths = [_ROOT, *filter(None, [environ.get("PYTHONPATH")])]
    return {**without_secrets(environ), "PYTHONPATH": os.pathsep.join(paths)}


def is_transient(error: PhalanxError) -> bool:
    """Say whether making the chunk again later may succeed though nobody does anything."""
    return isinstance(error, Unavailable | DeadlineExceeded)
