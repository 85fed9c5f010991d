"""Keeps the C library from giving large buffers back to the kernel after every message or leaf.

A message of a megabyte lives in several buffers of that size for a moment. By default glibc maps
each anew and unmaps it at once, so that every page of it is cleared and faulted in again: about a
third of the cost of moving tensors or blobs. So it is with the rows that a leaf process gathers
for a whole step, an eighth of the time of a step of the benchmark `worker_efficiency_1`.

By default each thread also has a heap of its own, and gRPC's threads each keep what their largest
burst of messages took. One heap for all of them halves what an aggregator keeps free; workers,
whose threads meet more often, are quicker with several.
"""

import ctypes
import sys

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_BUFFER_BYTES = 32 * 1024 * 1024
_KEPT_BYTES = 128 * 1024 * 1024


def reuse_large_buffers(*, heaps: int | None = None) -> bool:
    """Have buffers of up to 32 MiB reused from up to 128 MiB of free heap; call it once at start,
    before there are threads. With ``heaps`` all threads share so many.

    Returns whether it could be done: only glibc can.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    settings = [(_M_MMAP_THRESHOLD, _BUFFER_BYTES), (_M_TRIM_THRESHOLD, _KEPT_BYTES)]
    if heaps is not None:
        settings.append((_M_ARENA_MAX, heaps))
    done = [mallopt(name, value) == 1 for name, value in settings]
    return all(done)
