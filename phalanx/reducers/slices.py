"""Long arithmetic in slices: a generator that stops between them, for others to have their turn.

Whoever has nothing else to do calls ``whole``. Where a slice ends changes no bit of the result.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

ResultT = TypeVar("ResultT")

Steps = Generator[None, None, ResultT]
"""Stops between slices and returns the result."""

SLICE_ELEMENTS = 1 << 20
"""Elements looked at in a slice: some milliseconds, and tens of them where they are sorted."""


class Slices:
    """Says when a slice is long enough."""

    def __init__(self) -> None:
        self._done = 0

    def due(self, elements: int) -> bool:
        """So many elements were looked at; return whether to stop here."""
        self._done += elements
        if self._done < SLICE_ELEMENTS:
            return False
        self._done = 0
        return True


def whole(steps: Steps[ResultT]) -> ResultT:
    """Return the result of all slices, one right after the other."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: ResultT = end.value
            return result
