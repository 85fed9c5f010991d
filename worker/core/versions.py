"""Which parameter versions the worker holds, and which of its buffers each one fills.

Frames of a version come from the owners of all ranges, in any order. A version is *whole* once
every frame of every range is in; leaves run on whole versions only. Two buffers are enough: a
frame of version t + 2 proves that every range has committed t + 1, after which nobody needs a
gradient at t, so the lower buffer is taken over.

Where contributions commit one by one a leaf reads whatever version it was started with. Then a
buffer that a leaf reads is left alone, and there are as many more as leaves run at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from phalanx.errors import InvalidArgument
from phalanx.frames import frame_grid
from phalanx.v1 import training_pb2

BUFFERS = 2


@dataclass(slots=True)
class Place:
    """Where the payload of a version frame goes: elements of one of the two buffers."""

    version: int
    buffer: int
    first_element: int
    element_count: int
    key: int


@dataclass
class _Held:
    version: int
    buffer: int
    missing: set[int]


class VersionAssembly:
    """The versions of one job in one term."""

    def __init__(
        self,
        ranges: Sequence[training_pb2.ParameterRange],
        itemsize: int,
        buffers: int = BUFFERS,
        in_use: Callable[[], set[int]] = set,
    ) -> None:
        """`in_use` tells which of the `buffers` leaves are reading."""
        self._buffers = buffers
        self._in_use = in_use
        self._frames: dict[tuple[int, int], tuple[int, int, int]] = {}
        for piece in ranges:
            for first, count in frame_grid(piece.element_count, itemsize):
                key = len(self._frames)
                self._frames[piece.index, first] = (key, piece.first_element + first, count)
        self._held: dict[int, _Held] = {}
        self._whole = -1

    @property
    def whole_version(self) -> int:
        """The newest whole version; -1: none."""
        return self._whole

    @property
    def held_versions(self) -> list[int]:
        """Versions of which at least one frame is here, lowest first."""
        return sorted(self._held)

    def buffer_of(self, version: int) -> int:
        """The buffer that holds a version."""
        return self._held[version].buffer

    def place(self, range_index: int, version: int, first: int, count: int) -> Place | None:
        """Where to copy a frame that arrived; None: it is old or here already.

        Raises `InvalidArgument` for a frame that is not one of the range's grid.
        """
        frame = self._frames.get((range_index, first))
        if frame is None or frame[2] != count or version < 0:
            raise InvalidArgument(
                f"elements {first}+{count} of version {version} are no frame of range "
                f"{range_index}; check that both ends run the same version of Phalanx"
            )
        if version <= self._whole:
            return None
        held = self._held.get(version)
        if held is None:
            held = self._take_buffer(version)
            if held is None:
                return None
        if frame[0] not in held.missing:
            return None
        return Place(version, held.buffer, frame[1], count, frame[0])

    def stored(self, place: Place) -> bool:
        """The payload was copied; True: this made the version whole."""
        held = self._held.get(place.version)
        if held is None or held.buffer != place.buffer:
            return False
        held.missing.discard(place.key)
        if held.missing or place.version <= self._whole:
            return False
        self._whole = place.version
        return True

    def _take_buffer(self, version: int) -> _Held | None:
        if len(self._held) < self._buffers:
            used = {held.buffer for held in self._held.values()}
            buffer = min(set(range(self._buffers)) - used)
        else:
            in_use = self._in_use()
            free = [number for number, held in self._held.items() if held.buffer not in in_use]
            if not free or version < min(free):
                return None
            oldest = min(free)
            buffer = self._held.pop(oldest).buffer
            if oldest == self._whole:
                # Nobody needs this version any more, but it was the whole one.
                self._whole = -1
        held = _Held(version, buffer, {key for key, _, _ in self._frames.values()})
        self._held[version] = held
        return held
