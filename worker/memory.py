"""Shared memory of one job: parameter versions and payloads, in equal buffers of one arena.

The arena is an anonymous file in memory (memfd) that the session makes and hands to its leaf
processes by descriptor. It has no name, so nothing is left behind whoever is killed; it is sparse,
so a buffer costs memory only once it is written.
"""

from __future__ import annotations

import mmap
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

_PAGE = mmap.ALLOCATIONGRANULARITY


class Arena:
    """Numbered buffers of `element_count` elements, mapped on each side when first used."""

    def __init__(self, fd: int, element_count: int, dtype: np.dtype[Any], grow: bool) -> None:
        self.fd = fd
        self.element_count = element_count
        self.dtype = dtype
        self._grow = grow
        self._stride = -(-max(1, element_count * dtype.itemsize) // _PAGE) * _PAGE
        self._size = 0
        self._arrays: dict[int, NDArray[Any]] = {}
        self._raw: dict[int, NDArray[np.uint8]] = {}

    @classmethod
    def create(cls, name: str, element_count: int, dtype: np.dtype[Any]) -> Arena:
        """Make a new arena; `name` shows up in /proc only."""
        fd = os.memfd_create(f"phalanx-{name}"[:200], os.MFD_CLOEXEC)
        return cls(fd, element_count, dtype, grow=True)

    @classmethod
    def attach(cls, fd: int, element_count: int, dtype: np.dtype[Any]) -> Arena:
        """Use the arena of another process; takes the descriptor over."""
        return cls(fd, element_count, dtype, grow=False)

    def array(self, buffer: int) -> NDArray[Any]:
        """The elements of a buffer, page aligned. The file grows on the creator's side only."""
        array = self._arrays.get(buffer)
        if array is None:
            array = self.raw(buffer)[: self.element_count * self.dtype.itemsize].view(self.dtype)
            self._arrays[buffer] = array
        return array

    def raw(self, buffer: int) -> NDArray[np.uint8]:
        """All bytes of a buffer, to the end of its last page."""
        raw = self._raw.get(buffer)
        if raw is None:
            self.reserve(buffer)
            mapped = mmap.mmap(self.fd, self._stride, offset=buffer * self._stride)
            raw = self._raw[buffer] = np.frombuffer(mapped, np.uint8)
        return raw

    def reserve(self, buffer: int) -> None:
        """Make the file long enough for a buffer before another process maps it."""
        end = (buffer + 1) * self._stride
        if self._grow and end > self._size:
            os.ftruncate(self.fd, end)
            self._size = end

    def close(self) -> None:
        """Let go of it; the memory is free once no array and no other process holds it."""
        self._arrays.clear()
        self._raw.clear()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class ProgressPage:
    """What a leaf process is doing, readable at any time, also after its death.

    One page of shared memory with one writer per field: the leaf process writes all but `cancel`.
    """

    _TASK, _SHARD, _LEAVES, _CANCEL, _STEP, _SINCE = range(6)

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._words = np.frombuffer(mmap.mmap(fd, _PAGE), np.int64)

    @classmethod
    def create(cls) -> ProgressPage:
        """Make a page for one leaf process."""
        fd = os.memfd_create("phalanx-progress", os.MFD_CLOEXEC)
        os.ftruncate(fd, _PAGE)
        page = cls(fd)
        page._words[cls._SHARD] = -1
        return page

    @property
    def task(self) -> int:
        """The task that runs; 0: none."""
        return int(self._words[self._TASK])

    @property
    def shard(self) -> int:
        """The shard whose leaf runs; -1: none."""
        return int(self._words[self._SHARD])

    @property
    def step(self) -> int:
        """The step of the present task."""
        return int(self._words[self._STEP])

    @property
    def leaves(self) -> int:
        """Leaves finished since the process started."""
        return int(self._words[self._LEAVES])

    def begin_task(self, task: int, step: int) -> None:
        """A task starts."""
        self._words[self._STEP] = step
        self._words[self._TASK] = task

    def end_task(self) -> None:
        """The task is over."""
        self._words[self._TASK] = 0

    def begin_leaf(self, shard: int, now_ns: int) -> None:
        """The leaf of this shard starts."""
        self._words[self._SINCE] = now_ns
        self._words[self._SHARD] = shard

    def end_leaf(self) -> None:
        """The leaf is finished."""
        self._words[self._SHARD] = -1
        self._words[self._LEAVES] += 1

    def no_leaf(self) -> None:
        """No leaf runs, whether the last one was finished or not."""
        self._words[self._SHARD] = -1

    def leaf_seconds(self, now_ns: int) -> float:
        """How long the present leaf has been running; 0 where none is."""
        if self.shard < 0:
            return 0.0
        return max(0.0, (now_ns - int(self._words[self._SINCE])) / 1e9)

    def cancel(self, task: int) -> None:
        """Ask the leaf process to stop this task after its present leaf."""
        self._words[self._CANCEL] = task

    @property
    def cancelled_task(self) -> int:
        """The task that `cancel` named last."""
        return int(self._words[self._CANCEL])

    def close(self) -> None:
        """Close the descriptor; harmless when called twice."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
