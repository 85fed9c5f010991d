"""Copies of late shards at run time: watches the round, hands orders to streams, tells control."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from coordinator.aggregation.core.machine import JobRanges
from phalanx.copies import Copies, Order, Started
from phalanx.errors import InvalidArgument
from phalanx.frames import encode_response
from phalanx.given import GivenWork
from phalanx.reduction import Node
from phalanx.telemetry.logs import get_logger
from phalanx.v1 import aggregation_service_pb2 as pb
from phalanx.v1 import coordination_service_pb2 as coordination
from phalanx.v1.training_pb2 import GoRecord, TreeNode

LOOK_EVERY_S = 0.025
ORDERS_MAX = 16
"""Orders that wait for one stream; those of older rounds go first, and nobody misses them."""

_log = get_logger(__name__)


@dataclass
class _Stream:
    worker_id: str
    wake: Callable[[], None]
    orders: deque[bytes] = field(default_factory=lambda: deque(maxlen=ORDERS_MAX))
    #: Nodes of the newest round of which copies are needed to compare them, not sent yet.
    asked: Order | None = None


class Copying:
    """The late-shard rule for one job in one term.

    `tell` hands a message to control; `control_away` says whether it is not there
    to move the shards of the dead. Orders are proofs by `given`.
    """

    def __init__(
        self,
        ranges: JobRanges,
        tell: Callable[[coordination.SessionRequest], None],
        control_away: Callable[[], bool],
        given: GivenWork,
    ) -> None:
        self._ranges = ranges
        self._given = given
        self._tell = tell
        self._control_away = control_away
        self._copies = Copies()
        self._streams: dict[object, _Stream] = {}

    def stream_opened(self, key: object, hello: pb.ExchangeHello, wake: Callable[[], None]) -> None:
        """A worker opened a stream; `wake` makes it look for something to send."""
        self._streams[key] = _Stream(hello.worker_id, wake)
        self._copies.stream_opened(hello.worker_id, takes_copies=hello.takes_copies)

    def stream_closed(self, key: object) -> None:
        """A stream ended."""
        stream = self._streams.pop(key, None)
        if stream is not None:
            self._copies.stream_closed(stream.worker_id)
            self.look()

    def next_order(self, key: object) -> bytes | None:
        """Take the next order for a stream, encoded."""
        stream = self._streams.get(key)
        if stream is None:
            return None
        if stream.orders:
            return stream.orders.popleft()
        asked, stream.asked = stream.asked, None
        return self._encoded(asked) if asked is not None else None

    def ask(self, order: Order) -> None:
        """Ask a worker for copies that are to be compared; what waits of one round goes as one."""
        stream = self._stream_of(order.worker_id)
        if stream is not None:
            waiting = stream.asked.nodes if stream.asked and stream.asked.key == order.key else ()
            stream.asked = replace(order, nodes=waiting + order.nodes)
            stream.wake()

    def frame(self, key: object, frame: pb.ContributionFrame) -> None:
        """A frame arrived and is about to be handed to the ranges."""
        stream = self._streams.get(key)
        if stream is None:
            return
        try:
            node = Node(frame.node.first, frame.node.span)
        except InvalidArgument:
            return  # the ranges refuse it, and say why
        self._copies.frame(
            stream.worker_id,
            (frame.step, frame.round),
            node,
            copy=frame.copy,
            now_s=time.monotonic(),
        )

    def turn(self) -> None:
        """The ranges did something: another round may be open."""
        if self._copies.turn(self._ranges.open_round, time.monotonic()):
            self.look()

    def look(self) -> None:
        """Have copied what is due."""
        orders, started = self._copies.look(time.monotonic(), control_away=self._control_away())
        for order in orders:
            self._hand_over(order)
        for each in started:
            self._tell_control(each)

    def late_workers(self, elapsed_s: float) -> list[coordination.LateWorker]:
        """Whose shards others compute, or should, for the report to control.

        `elapsed_s` is the time since the ranges were assigned.
        """
        late = self._copies.late_workers(time.monotonic()) | self._ranges.late_workers(elapsed_s)
        told = [
            coordination.LateWorker(worker_id=worker_id, late_s=late_s)
            for worker_id, late_s in sorted(late.items())
        ]
        shards = self._ranges.late_shards(elapsed_s)
        if shards:
            whose = coordination.LateWorker(late_s=max(shards.values()), shards=sorted(shards))
            told.append(whose)
        return told

    def waits_for_starts(self, elapsed_s: float) -> bool:
        """Whether a leaf that was started, or could be, is late: nobody copies those."""
        ranges = self._ranges
        return bool(ranges.late_workers(elapsed_s) or ranges.late_shards(elapsed_s))

    def _hand_over(self, order: Order) -> None:
        stream = self._stream_of(order.worker_id)
        if stream is not None:
            stream.orders.append(self._encoded(order))
            stream.wake()

    def _stream_of(self, worker_id: str) -> _Stream | None:
        """The newest stream of a worker."""
        streams = [each for each in self._streams.values() if each.worker_id == worker_id]
        return streams[-1] if streams else None

    def _encoded(self, order: Order) -> bytes:
        nodes = [TreeNode(first=node.first, span=node.span) for node in order.nodes]
        wanted = pb.CopyNodes(
            term=self._ranges.term,
            version=max(0, order.key[0]),
            round=order.key[1],
            nodes=nodes,
            given=self._given.order(order.worker_id, nodes),
        )
        return encode_response(pb.ExchangeResponseHeader(copy_nodes=wanted))

    def _tell_control(self, started: Started) -> None:
        job_id = self._ranges.plan.job_id
        _log.info(
            "copies_started",
            job_id=job_id,
            worker_id=started.worker_id,
            cause=started.cause,
            step=started.key[0],
            shards=len(started.shards),
            waited_s=round(started.waited_s, 4),
        )
        message = coordination.CopiesStarted(
            job_id=job_id,
            term=self._ranges.term,
            step=self._ranges.step_of(max(0, started.key[0])),
            worker_id=started.worker_id,
            cause=started.cause,
            shards=started.shards,
            copied_to=started.copied_to,
            waited_s=started.waited_s,
            patience_s=started.patience_s,
            evaluation=started.action == GoRecord.ACTION_EVALUATE,
        )
        self._tell(coordination.SessionRequest(copies_started=message))
