"""Which leaves were started where, in a job whose contributions commit one by one.

A worker says on its stream how many more leaves it could begin, and for which shards. The root
starts them one by one, each with the version that is the newest at that moment, and keeps that
version until the contribution is in or given up: at most one for each shard on each stream. A
contribution is collected with the start that it answers and counts once all of its frames are in.

What a stream was given is forgotten with it. The worker begins anew on the next one, so nothing has
to be compared after a break: which step a shard is at decides what counts.

A worker that gets its messages and whose own never arrive asks for nothing, so nothing is started
and nothing is late. Hence shards are looked after that could start and that no stream would take.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coordinator.aggregation.core.versions import Version
from phalanx.errors import InvalidArgument
from phalanx.rounds import (
    RoundSpec,
    check_node,
    mask_of,
    payload_values,
)
from phalanx.texts import number_of
from phalanx.training.asynchronous import Clocks
from phalanx.v1 import aggregation_service_pb2 as pb

Array = NDArray[Any]

_ABSENT: Array = np.empty(0)
"""Stands for a frame of a shard that contributes nothing."""


@dataclass
class Start:
    """A leaf that a worker was told to run: one step of one shard, at one version."""

    shard: int
    step: int
    #: Counts the starts of its stream from 1.
    number: int
    version: Version
    began_s: float
    frames: list[Array | None]
    #: (examples, loss, whether the shard is present), pinned by the first frame.
    scalars: tuple[int, float, bool] | None = None
    left: int = 0

    def take(
        self, spec: RoundSpec, grid: dict[int, int], frame: pb.ContributionFrame, data: memoryview
    ) -> bool:
        """Take one frame of the contribution; True: it is whole now.

        Raises `InvalidArgument` where the frame does not fit the start or the frames before it.
        """
        if (frame.shard_step, frame.step) != (self.step, self.version.number):
            raise InvalidArgument(
                f"shard {self.shard} was started at step {self.step} on version "
                f"{self.version.number}; step {frame.shard_step} on version {frame.step} came"
            )
        node = check_node(frame.node, spec.width)
        present = mask_of(frame, node, spec.width) != 0
        scalars = (frame.example_count, frame.loss_sum, present)
        index, values = payload_values(spec, grid, frame, data, int(present))
        if self.scalars is None:
            self.scalars = scalars
        elif self.scalars != scalars:
            raise InvalidArgument(
                f"two frames of shard {self.shard} at step {self.step} differ in their examples, "
                "their loss or whether there are any"
            )
        if self.frames[index] is None:
            self.left -= 1
        self.frames[index] = values if values is not None else _ABSENT
        return self.left == 0


@dataclass
class StreamStarts:
    """What one stream was given, and could be given."""

    worker_id: str
    hosted: frozenset[int] = frozenset()
    given: int = 0
    wanted: int = 0
    starts: dict[int, Start] = field(default_factory=dict)

    @property
    def idle(self) -> bool:
        """It runs nothing and has not asked for more, as if nobody were there."""
        return not self.starts and self.given >= self.wanted

    def want(self, message: pb.StartsWanted) -> None:
        """Take the newest wish; starts that it does not know of any more were given up.

        Those that are answered wait for their turn to be applied: the worker is through with them.
        """
        self.hosted = frozenset(message.shards)
        self.wanted = message.wanted
        working = self.hosted.intersection(message.working)
        for shard, start in list(self.starts.items()):
            if start.number <= message.received and shard not in working and start.left > 0:
                del self.starts[shard]


class Starts:
    """All starts that were not answered yet, by stream."""

    def __init__(self, clocks: Clocks, frame_count: int) -> None:
        self._clocks = clocks
        self._frame_count = frame_count
        self._streams: dict[object, StreamStarts] = {}
        self._touched: set[int] = set()
        self._touched_s = [0.0] * len(clocks.completed)

    @property
    def all(self) -> Iterator[tuple[StreamStarts, Start]]:
        """Every start under way."""
        for stream in self._streams.values():
            for start in stream.starts.values():
                yield stream, start

    def open(self, stream: object, worker_id: str) -> None:
        """A stream was opened."""
        self._streams[stream] = StreamStarts(worker_id)

    def close(self, stream: object) -> None:
        """A stream ended, and what it was given with it."""
        self._streams.pop(stream, None)

    def want(self, stream: object, message: pb.StartsWanted, width: int) -> None:
        """A worker says what it could begin. Raises `InvalidArgument` for shards there are not."""
        for shard in (*message.shards, *message.working):
            if not 0 <= shard < width:
                raise InvalidArgument(f"there is no shard {shard}: {number_of(width, 'shard')}")
        known = self._streams.get(stream)
        if known is not None:
            known.want(message)
            self._touched |= known.hosted

    def give(self, stream: object, version: Version, now_s: float) -> Start | None:
        """Start the leaf that is furthest behind of those that the stream could begin, if any."""
        known = self._streams.get(stream)
        if known is None or known.given >= known.wanted:
            return None
        shard = self._clocks.first_of(known.hosted - known.starts.keys())
        if shard is None:
            return None
        known.given += 1
        start = Start(
            shard=shard,
            step=self._clocks.step_of(shard),
            number=known.given,
            version=version,
            began_s=now_s,
            frames=[None] * self._frame_count,
            left=self._frame_count,
        )
        known.starts[shard] = start
        return start

    def find(self, stream: object, shard: int) -> Start | None:
        """What the stream was told to run for a shard."""
        known = self._streams.get(stream)
        return known.starts.get(shard) if known is not None else None

    def committed(self, shard: int) -> None:
        """A step of a shard has committed: nobody else's contribution to it counts."""
        for stream in self._streams.values():
            if stream.starts.pop(shard, None) is not None:
                self._touched |= stream.hosted

    def drop(self, start: Start) -> None:
        """Forget a start whose contribution does not count, so that it can be started again."""
        for stream in self._streams.values():
            if stream.starts.get(start.shard) is start:
                del stream.starts[start.shard]

    def unattended_s(self, now_s: float, *, opens: bool = False) -> dict[int, float]:
        """Shards that could start and that no stream runs or would take, with for how long.

        As of the last call that found it otherwise; with `opens` nothing could start before.
        """
        hosted = [each.hosted for each in self._streams.values() if not each.idle]
        attended = self._touched.union(*hosted)
        self._touched = set()
        unattended: dict[int, float] = {}
        for shard, touched_s in enumerate(self._touched_s):
            if opens or shard in attended or not self._clocks.may_start(shard):
                self._touched_s[shard] = now_s
            else:
                unattended[shard] = now_s - touched_s
        return unattended
