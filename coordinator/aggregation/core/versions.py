"""The version store of one range: whole and growing parameter versions, ready to be sent.

A version is a list of *encoded* messages (`ExchangeResponse` as immutable bytes), one per frame of
the range's grid. Encoding once serves every worker; nobody can change what another one is sending,
so a sender needs no lock and has nothing to check again after a copy. Frames become available one
by one, in the order in which their trees complete.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from phalanx.compressors import Codec, encoded
from phalanx.errors import Internal
from phalanx.frames import encode_response
from phalanx.v1 import aggregation_service_pb2 as pb

NONE = -1
"""Number of the version of a range that was not initialised yet."""


class Version:
    """One parameter version of one range."""

    __slots__ = ("frames", "number", "order", "values")

    def __init__(self, number: int, frame_count: int) -> None:
        self.number = number
        #: Per frame the elements: views of `frames`, unless these are encoded with a loss.
        self.values: list[NDArray[np.generic] | None] = [None] * frame_count
        self.frames: list[bytes | None] = [None] * frame_count
        #: Frame indexes in the order in which they were published; senders follow it.
        self.order: list[int] = []

    @property
    def whole(self) -> bool:
        """Every frame was published."""
        return len(self.order) == len(self.frames)


class VersionStore:
    """At most two versions of one range: the newest whole one and the one that grows from it."""

    def __init__(
        self,
        term: int,
        range_index: int,
        grid: list[tuple[int, int]],
        dtype: np.dtype[np.generic],
        codec: Codec | None = None,
    ) -> None:
        self.grid = grid
        self._codec = codec
        self.dtype = dtype
        self._headers = [
            pb.ExchangeResponseHeader(
                frame=pb.VersionFrame(
                    term=term, range=range_index, first_element=first, element_count=count
                )
            )
            for first, count in grid
        ]
        self._versions: dict[int, Version] = {}
        self.newest_whole = NONE

    @property
    def held(self) -> list[int]:
        """Numbers of the held versions, oldest first."""
        return sorted(self._versions)

    @property
    def oldest(self) -> int:
        """Number of the oldest held version; -1: none is held."""
        return min(self._versions, default=NONE)

    def get(self, number: int) -> Version | None:
        """The version, or None where it was dropped or does not exist yet."""
        return self._versions.get(number)

    def only_frame(self, number: int) -> bytes | None:
        """The version's message, where it is whole and made of one frame."""
        version = self._versions.get(number)
        return version.frames[0] if version is not None and len(version.frames) == 1 else None

    def following(self, number: int) -> Version | None:
        """The oldest held version above `number`: where a sender goes on, or jumps to."""
        newer = [held for held in self._versions if held > number]
        return self._versions[min(newer)] if newer else None

    def publish(self, number: int, index: int, values: NDArray[np.generic]) -> None:
        """Encode one frame of a version and make it available to senders."""
        version = self._versions.get(number)
        if version is None:
            if len(self._versions) >= 2:
                raise Internal(f"a third version, {number}, beside {self.held}")
            version = self._versions[number] = Version(number, len(self.grid))
        if version.frames[index] is not None:
            raise Internal(f"frame {index} of version {number} was made twice")
        self._fill(version, index, values)
        if version.whole:
            self.newest_whole = number

    def whole_of(self, number: int, frames: Sequence[NDArray[np.generic]]) -> Version:
        """Return a version of these elements as it would be sent, without holding it."""
        version = Version(number, len(self.grid))
        for index, values in enumerate(frames):
            self._fill(version, index, values)
        return version

    def _fill(self, version: Version, index: int, values: NDArray[np.generic]) -> None:
        header = self._headers[index]
        header.frame.version = version.number
        if self._codec is None:
            frame = version.frames[index] = encode_response(header, values.data)
            version.values[index] = payload_of(frame, len(values), self.dtype)
        else:
            kept = version.values[index] = values.copy()
            kept.flags.writeable = False
            version.frames[index] = encode_response(header, encoded(self._codec, kept).data)
        version.order.append(index)

    def values(self, number: int, index: int) -> NDArray[np.generic]:
        """The elements of one published frame, read-only; not what is sent if that has a loss."""
        values = self._versions[number].values[index]
        if values is None:
            raise Internal(f"frame {index} of version {number} does not exist yet")
        return values

    def drop_before(self, number: int) -> None:
        """Forget all versions below `number`."""
        for held in self.held:
            if held < number:
                del self._versions[held]


def payload_of(
    frame: bytes, element_count: int, dtype: np.dtype[np.generic]
) -> NDArray[np.generic]:
    """The elements at the end of an encoded message."""
    offset = len(frame) - element_count * dtype.itemsize
    return np.frombuffer(frame, dtype, element_count, offset)
