"""How a process ends with the one that started it."""

import ctypes
import os
import signal
import sys

EXIT_INTERRUPTED = 130
_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int, signal_number: int = signal.SIGKILL) -> None:
    """Have the kernel send ``signal_number`` to this process when its parent dies (Linux); 0: no
    parent.

    SIGKILL by default: it also ends a process that is stopped or busy, and every service survives
    it anyhow. If ``parent_pid`` is not the parent any more, the parent died before this call: exit
    at once. Beware: for the kernel, "parent" is the *thread* that started this process, so start
    processes from a thread that lives as long as they should.
    """
    if parent_pid == 0:
        return
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, int(signal_number), 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:
        os._exit(EXIT_INTERRUPTED)
