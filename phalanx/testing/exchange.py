"""A worker's half of the exchange, without leaves: for tests and benchmarks of aggregators.

    async with ExchangeClient(address, "job-1", term=1, layout=[(0, 10_000)]) as client:
        go = await client.next_go()
        await client.send_node(go, Node(0, 2), gradient, count=64, loss=1.5)
        parameters = await client.whole(go.version + 1)

It speaks the real protocol over real gRPC. Every wait has a deadline, which a healthy test never
comes near.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Self

import grpc
import grpc.aio
import numpy as np
from numpy.typing import NDArray

from phalanx.errors import PhalanxError, Unavailable
from phalanx.frames import decode_response, encode_request, frame_grid
from phalanx.reduction import Node
from phalanx.rpc.channel import open_channel
from phalanx.rpc.status import from_rpc_error
from phalanx.v1 import aggregation_service_pb2 as pb
from phalanx.v1 import training_pb2
from phalanx.v1.training_pb2 import GoRecord

METHOD = "/phalanx.v1.AggregationService/Exchange"
DEADLINE_S = 60.0

_VECTORS = {
    GoRecord.ACTION_INITIALISE: "parameters",
    GoRecord.ACTION_TRAIN: "gradient",
    GoRecord.ACTION_EVALUATE: "evaluation",
}


def node_frames(
    go: GoRecord,
    node: Node,
    vector: NDArray[Any],
    *,
    count: int,
    loss: float,
    range_index: int = 0,
    mask: bytes = b"",
    copy: bool = False,
) -> list[tuple[pb.ContributionFrame, memoryview]]:
    """The frames of one node's vector for one range; `vector` is the range's part.

    A mask without a shard makes frames without payload.
    """
    grid = frame_grid(len(vector), vector.itemsize)
    if go.action == GoRecord.ACTION_EVALUATE:
        grid = [(0, len(vector))]
    empty = bool(mask) and not any(mask)
    frames = []
    for first, length in grid:
        header = pb.ContributionFrame(
            term=go.term,
            step=go.version,
            round=go.round,
            range=range_index,
            node=training_pb2.TreeNode(first=node.first, span=node.span),
            vector=_VECTORS[go.action],
            first_element=first,
            element_count=length,
            shard_mask=mask,
            example_count=count,
            loss_sum=loss,
            copy=copy,
        )
        payload = memoryview(b"") if empty else vector[first : first + length].data.cast("B")
        frames.append((header, payload))
    return frames


class ExchangeClient:
    """One stream to one aggregator.

    `ranges` maps each range that the aggregator owns to its element count. What arrives is put
    together in `versions`; only the two newest versions are kept.
    """

    def __init__(
        self,
        address: str,
        job_id: str,
        term: int,
        ranges: Mapping[int, int],
        *,
        worker_id: str = "worker",
        dtype: str = "<f4",
        joins: bool = True,
        takes_copies: bool = False,
        given: training_pb2.Given | None = None,
    ) -> None:
        hello = pb.ExchangeHello(
            job_id=job_id,
            term=term,
            worker_id=worker_id,
            incarnation=worker_id,
            takes_joined_go_records=joins,
            takes_copies=takes_copies,
            given=given,
        )
        self._hello = pb.ExchangeRequestHeader(hello=hello)
        self.address = address
        self._ranges = dict(ranges)
        self._dtype = np.dtype(dtype)
        self._channel: grpc.aio.Channel | None = None
        self._call: Any = None
        self._reader: asyncio.Task[None] | None = None
        self._arrived = asyncio.Condition()
        self._writing = asyncio.Lock()
        self.versions: dict[int, dict[int, NDArray[Any]]] = {}
        self._missing: dict[int, dict[int, int]] = {}
        self.go_records: list[GoRecord] = []
        self._next_go = 0
        #: Copies that were asked for and not taken by `next_order` yet.
        self.orders: list[pb.CopyNodes] = []
        #: How many go records came along with a version.
        self.joined = 0
        self.welcome = pb.ExchangeWelcome()
        self.error: PhalanxError | None = None
        self.reading = asyncio.Event()
        self.reading.set()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def open(self) -> None:
        """Say hello and wait for the welcome. Raises the PhalanxError that the aggregator sent."""
        self._channel = open_channel(self.address, own_connection=True)
        self._call = self._channel.stream_stream(METHOD)(timeout=10 * DEADLINE_S)
        try:
            async with asyncio.timeout(DEADLINE_S):
                await self._call.write(encode_request(self._hello))
                data = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None
        except asyncio.InvalidStateError:
            data = grpc.aio.EOF
        if data is grpc.aio.EOF:
            raise await self._end()
        self.welcome = decode_response(data)[0].welcome
        self._reader = asyncio.create_task(self._read())

    async def close(self) -> None:
        """Break the stream, as a dying worker does."""
        if self._call is not None:
            self._call.cancel()
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
        if self._channel is not None:
            await self._channel.close()

    # -- sending

    async def send(self, header: pb.ContributionFrame, payload: memoryview) -> None:
        """Send one frame."""
        await self.send_bytes(encode_request(pb.ExchangeRequestHeader(frame=header), payload))

    async def send_bytes(self, data: bytes) -> None:
        """Send one message as it is; gRPC takes one at a time."""
        async with self._writing:
            await self._call.write(data)

    async def send_go(self, go: GoRecord) -> None:
        """Carry a go record."""
        await self.send_bytes(encode_request(pb.ExchangeRequestHeader(go_record=go)))

    async def send_node(
        self,
        go: GoRecord,
        node: Node,
        vector: NDArray[Any],
        *,
        count: int,
        loss: float = 0.0,
        range_index: int = 0,
        mask: bytes = b"",
    ) -> None:
        """Send all frames of a node's vector for one range."""
        for header, payload in node_frames(
            go, node, vector, count=count, loss=loss, range_index=range_index, mask=mask
        ):
            await self.send(header, payload)

    # -- waiting

    async def next_go(self, *actions: GoRecord.Action.ValueType) -> GoRecord:
        """The next go record (of these actions, if any are named), in order."""
        while True:
            await self._until(lambda: len(self.go_records) > self._next_go)
            go = self.go_records[self._next_go]
            self._next_go += 1
            if not actions or go.action in actions:
                return go

    async def next_order(self) -> pb.CopyNodes:
        """The next order of copies."""
        await self._until(lambda: self.orders)
        return self.orders.pop(0)

    async def whole(self, version: int, range_index: int = 0) -> NDArray[Any]:
        """A range's part of a version, once all of it is here."""
        await self._until(lambda: self.is_whole(version, range_index))
        return self.versions[version][range_index]

    def is_whole(self, version: int, range_index: int = 0) -> bool:
        """Whether all frames of a range's part of a version are here."""
        return self._missing.get(version, {}).get(range_index, 1) == 0

    async def ended(self) -> PhalanxError:
        """Wait until the aggregator ends the stream; return why."""
        await self._until(lambda: self.error is not None, ended_is_wrong=False)
        assert self.error is not None
        return self.error

    async def _until(self, condition: Any, *, ended_is_wrong: bool = True) -> None:
        async with asyncio.timeout(DEADLINE_S), self._arrived:
            await self._arrived.wait_for(lambda: condition() or self.error is not None)
        if ended_is_wrong and not condition():
            assert self.error is not None
            raise self.error

    # -- inside

    async def _read(self) -> None:
        while True:
            await self.reading.wait()
            try:
                data = await self._call.read()
            except grpc.aio.AioRpcError as error:
                await self._broke(from_rpc_error(error))
                return
            if data is grpc.aio.EOF:
                await self._broke(await self._end())
                return
            self._take(data)
            async with self._arrived:
                self._arrived.notify_all()

    def _take(self, data: bytes) -> None:
        header, payload = decode_response(data)
        if header.HasField("go_record"):
            self.go_records.append(header.go_record)
            return
        if header.HasField("copy_nodes"):
            self.orders.append(header.copy_nodes)
            return
        frame = header.frame
        version = self.versions.get(frame.version)
        if version is None:
            for old in sorted(self.versions)[:-1]:
                del self.versions[old], self._missing[old]
            version = self.versions[frame.version] = {
                index: np.empty(count, self._dtype) for index, count in self._ranges.items()
            }
            self._missing[frame.version] = dict(self._ranges)
        first, count = frame.first_element, frame.element_count
        version[frame.range][first : first + count] = np.frombuffer(payload, self._dtype)
        self._missing[frame.version][frame.range] -= count
        if header.HasField("joined_go_record"):
            self.go_records.append(header.joined_go_record)
            self.joined += 1

    async def _broke(self, error: PhalanxError) -> None:
        async with self._arrived:
            self.error = error
            self._arrived.notify_all()

    async def _end(self) -> PhalanxError:
        code = await self._call.code()
        if code is grpc.StatusCode.OK:
            return Unavailable("the aggregator ended the stream")
        return from_rpc_error(
            grpc.aio.AioRpcError(
                code,
                await self._call.initial_metadata(),
                await self._call.trailing_metadata(),
                details=await self._call.details(),
            )
        )


async def forward(go: GoRecord, clients: Sequence[ExchangeClient]) -> None:
    """Carry a go record to the owners of other ranges, as workers do."""
    for client in clients:
        await client.send_go(go)
