"""Continues stopped processes when whoever stopped them is gone, however it went.

A process of its own, started as ``python -P -m phalanx.chaos.guard``. On standard input it is told
``+PID`` before a process is stopped and ``-PID`` after it was continued for good. At the end of
input, which also the death of the sender by ``kill -9`` is, it continues what is left and ends.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterable


def main() -> int:
    """Guard until the end of standard input."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    guard(sys.stdin)
    return 0


def guard(lines: Iterable[str]) -> None:
    """Do what the lines say; at their end continue every process that was not taken back."""
    stopped: dict[int, int] = {}
    for line in lines:
        pid = int(line[1:])
        if line.startswith("+"):
            # The handle stays with this very process; its number may go to another one later.
            with contextlib.suppress(ProcessLookupError):
                stopped.setdefault(pid, os.pidfd_open(pid))
        elif pid in stopped:
            os.close(stopped.pop(pid))
    for handle in stopped.values():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            signal.pidfd_send_signal(handle, signal.SIGCONT)


if __name__ == "__main__":
    raise SystemExit(main())
