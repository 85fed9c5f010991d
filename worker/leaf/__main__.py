"""`python -P -m worker.leaf SOCKET_FD PROGRESS_FD PARENT_PID MEMORY_LIMIT_BYTES`.

Started by the session process only, which sets the thread counts of the numeric libraries in the
environment, since they are read when NumPy is first imported.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import signal
import socket
import sys


def main() -> int:
    """Serve the session process until it closes the socket or dies."""
    socket_fd, progress_fd, parent_pid, memory_limit_bytes = map(int, sys.argv[1:])
    from worker.leaf import limits

    limits.die_with(parent_pid)
    limits.no_core_dumps()
    limits.give_way()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    faulthandler.enable()

    from worker.ipc import BlockingConnection, ConnectionClosed
    from worker.leaf.loop import LeafLoop
    from worker.memory import ProgressPage

    limits.limit_memory(memory_limit_bytes)
    # What is loaded stays: the collector need not walk through it between leaves.
    gc.freeze()
    connection = socket.socket(fileno=socket_fd)
    with contextlib.suppress(ConnectionClosed):
        LeafLoop(BlockingConnection(connection), ProgressPage(progress_fd)).serve()
    # Threads and exit hooks of user code do not keep a process that has no work any more.
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
