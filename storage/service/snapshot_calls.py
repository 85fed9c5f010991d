"""Backups: rows as of one moment, and the hold on what they name."""

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress

from phalanx.errors import Unavailable
from phalanx.v1 import storage_service_pb2 as pb
from storage.interfaces import SnapshotStore
from storage.service.holds import RENEW_S, Holds
from storage.service.operations import Operations

_AHEAD_MESSAGES = 4
_FIRST_S = 0.2
_PATIENCE_S = 60.0
"""A caller that takes nothing for so long is given up: the database keeps the moment for it."""


class SnapshotCalls:
    """The call of StorageService that backups make."""

    def __init__(self, snapshots: SnapshotStore, operations: Operations, holds: Holds) -> None:
        self._snapshots = snapshots
        self._operations = operations
        self._holds = holds

    async def read(self) -> AsyncGenerator[pb.ReadSnapshotResponse]:
        """Yield a snapshot; hold on to what it names until the caller ends the call."""
        lease = await self._holds.take()
        try:
            told = _Told(self._snapshots)
            stream = self._operations.stream("read_snapshot", told, self._operations.blob_pool)
            now_s = asyncio.get_running_loop().time
            last_s = began_s = now_s()
            try:
                async with aclosing(stream) as messages:
                    async for message in messages:
                        began_s = now_s()
                        yield message
                        if now_s() - last_s >= RENEW_S:
                            last_s = now_s()
                            await self._holds.renew(lease)
            finally:
                told.close()
            while True:
                await asyncio.sleep(min(RENEW_S, _FIRST_S + now_s() - began_s))
                held_s = now_s() - began_s
                await self._holds.renew(lease)
                yield pb.ReadSnapshotResponse(held_s=held_s)
        finally:
            await self._holds.let_go(lease)


class _Told:
    """The messages of a snapshot, which a thread of its own reads, as an iterator."""

    def __init__(self, snapshots: SnapshotStore) -> None:
        self._snapshots = snapshots
        self._queue: queue.Queue[pb.ReadSnapshotResponse | BaseException | None] = queue.Queue(
            _AHEAD_MESSAGES
        )
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="snapshot", daemon=True)
        self._thread.start()

    def __iter__(self) -> "_Told":
        return self

    def __next__(self) -> pb.ReadSnapshotResponse:
        told = self._queue.get()
        if told is None:
            raise StopIteration
        if isinstance(told, BaseException):
            raise told
        return told

    def close(self) -> None:
        """Have the thread end."""
        self._closed.set()
        with suppress(queue.Empty):
            while True:
                self._queue.get_nowait()

    def _run(self) -> None:
        try:
            self._snapshots.read(self._tell)
        except BaseException as error:  # noqa: BLE001 - raised where the messages are taken
            self._tell(error)
        else:
            self._tell(None)

    def _tell(self, told: pb.ReadSnapshotResponse | BaseException | None) -> None:
        try:
            self._queue.put(told, timeout=0 if self._closed.is_set() else _PATIENCE_S)
        except queue.Full:
            if not isinstance(told, pb.ReadSnapshotResponse):
                return  # nobody listens any more
            raise Unavailable("whoever asked for the snapshot took too long") from None
        if self._closed.is_set() and isinstance(told, pb.ReadSnapshotResponse):
            raise Unavailable("whoever asked for the snapshot has ended")
