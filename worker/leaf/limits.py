"""What the operating system is asked to hold a leaf process to."""

from __future__ import annotations

import contextlib
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


def give_way() -> None:
    """Be scheduled as what it is, a batch process: whoever has little to do at once goes first.

    The session process and the aggregator wake up for a moment in every step, and all leaves wait
    for what they do then.
    """
    if sys.platform == "linux":
        with contextlib.suppress(PermissionError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def limit_memory(limit_bytes: int) -> None:
    """Refuse private memory above `limit_bytes` (0: no limit), so that it ends in a MemoryError.

    Shared parameters, payloads and mapped chunks do not count.
    """
    if limit_bytes:
        resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))


def show_gpus(names: str) -> None:
    """Let CUDA see these GPUs only, comma separated; empty: none."""
    os.environ["CUDA_VISIBLE_DEVICES"] = names


def no_core_dumps() -> None:
    """A crashing leaf must not fill the disk."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
