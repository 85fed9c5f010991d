"""What the operating system is asked to hold a leaf process to."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with(parent_pid: int) -> None:
    """Be killed when the session process dies, however busy this one is then.

    The end of the socket says the same, but nobody reads it while user code runs.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(1)


def limit_memory(limit_bytes: int) -> None:
    """Refuse private memory above `limit_bytes` (0: no limit), so that it ends in a MemoryError.

    Shared parameters, payloads and mapped chunks do not count.
    """
    if limit_bytes:
        resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))


def no_core_dumps() -> None:
    """A crashing leaf must not fill the disk."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
