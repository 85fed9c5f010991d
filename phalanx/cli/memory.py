"""Keeps a command that works through large files small on every machine.

Files are read piece by piece, and what a piece takes is little. What grows beside it is not the
data but the machine: one heap and one stack per thread, one thread per core in BLAS, Arrow and
gRPC, and the gigabyte that Arrow's own allocator sets aside at once. Little of that is ever
touched, but a limit on addresses (``ulimit -v``, a batch system) counts all of it.
"""

import ctypes
import os
import sys
from collections.abc import MutableMapping

from phalanx.blas import pin_one_thread

_M_ARENA_MAX = -8
_STACK_BYTES = 1 << 20
_ATTRIBUTES_BYTES = 64
"""At least the size of a ``pthread_attr_t`` on every machine."""


def bound_memory(environ: MutableMapping[str, str] = os.environ) -> None:
    """Have this whole process make do with one heap, small stacks and few threads.

    Call it before NumPy or Arrow are imported and before there are threads; only a program of our
    own may, since it holds for everything that the process does from now on.
    """
    # Arrow parses with as many threads as OpenMP may have. One is as quick: encoding takes longer.
    pin_one_thread(environ)
    environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    if sys.platform == "linux":
        _tell_the_c_library()


def _tell_the_c_library() -> None:
    """Only glibc can be told; others have neither a heap per thread nor stacks of 8 MiB."""
    libc = ctypes.CDLL(None)
    attributes = ctypes.create_string_buffer(_ATTRIBUTES_BYTES)
    try:
        libc.mallopt(_M_ARENA_MAX, 1)
        libc.pthread_attr_init(attributes)
        libc.pthread_attr_setstacksize(attributes, ctypes.c_size_t(_STACK_BYTES))
        libc.pthread_setattr_default_np(attributes)
    except AttributeError:
        return
