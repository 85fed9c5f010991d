"""Doing harm to processes, and undoing what can be undone whatever happens."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from types import TracebackType
from typing import Self

import psutil

from phalanx.chaos.schedule import KILL, SLOW, Fault
from phalanx.errors import PermissionDenied

SLOW_RUNS_S, SLOW_STOPS_S = 0.02, 0.18
"""A slow process runs a tenth of the time, in slices so short that its heartbeats get through."""
_JOIN_S = 5.0


class Harm:
    """Sends the signals. Use it in a ``with`` block: at its end nothing is stopped any more."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self._holds: dict[int, threading.Thread] = {}
        self._told = threading.Lock()
        self._guard = subprocess.Popen(
            [sys.executable, "-P", "-m", "phalanx.chaos.guard"],
            stdin=subprocess.PIPE,
            # A Ctrl-C in the terminal is for the program alone.
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def held(self) -> set[int]:
        """Process ids of the members that are paused or slow at the moment."""
        return {pid for pid, hold in self._holds.items() if hold.is_alive()}

    def inflict(self, fault: Fault, pid: int) -> bool:
        """Harm a process; return False if it is gone. Pauses and slowness end by themselves.

        Raises PermissionDenied if the process belongs to somebody else.
        """
        try:
            if fault.action == KILL:
                os.kill(pid, signal.SIGKILL)
                return True
            process = psutil.Process(pid)
            family = [process, *process.children(recursive=True)]
            # Shows at once whether it may be done at all.
            os.kill(pid, signal.SIGCONT)
        except (ProcessLookupError, psutil.NoSuchProcess):
            return False
        except (PermissionError, psutil.AccessDenied):
            raise PermissionDenied(
                f"process {pid} belongs to another user; run `phalanx chaos` as that user"
            ) from None
        hold = threading.Thread(target=self._hold, args=(fault, family), daemon=True)
        self._holds[pid] = hold
        hold.start()
        return True

    def release(self) -> None:
        """Continue whatever is paused or slow, now."""
        self._over.set()
        for hold in self._holds.values():
            hold.join(_JOIN_S)
        self._holds.clear()
        self._over.clear()

    def close(self) -> None:
        """Release everything and end the guard, which continues what a thread of ours left."""
        self.release()
        with contextlib.suppress(OSError):
            self._guard.communicate(timeout=_JOIN_S)

    def _hold(self, fault: Fault, family: list[psutil.Process]) -> None:
        """Stop and continue a process and its children until the time is over."""
        stops_s, runs_s = fault.lasts_s, 0.0
        if fault.action == SLOW:
            stops_s, runs_s = SLOW_STOPS_S, SLOW_RUNS_S
        rounds = max(1, round(fault.lasts_s / (stops_s + runs_s)))
        try:
            self._tell("+", family)
            for _ in range(rounds):
                _send(signal.SIGSTOP, family)
                ended = self._over.wait(stops_s)
                _send(signal.SIGCONT, family)
                if ended or self._over.wait(runs_s):
                    break
        finally:
            _send(signal.SIGCONT, family)
            self._tell("-", family)

    def _tell(self, sign: str, family: list[psutil.Process]) -> None:
        lines = "".join(f"{sign}{process.pid}\n" for process in family)
        assert self._guard.stdin is not None
        with self._told:
            self._guard.stdin.write(lines.encode())
            self._guard.stdin.flush()


def _send(number: signal.Signals, family: list[psutil.Process]) -> None:
    for process in family:
        # psutil compares start times, so a number that went to another process is left alone.
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            process.send_signal(number)
