"""Runs blocking back-end work in threads, timed and counted.

There are two pools, so that bulk transfers never make a journal wait for a thread.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import aclosing
from typing import Any, TypeVar

from phalanx.errors import DataLoss, PhalanxError
from phalanx.telemetry.logs import get_logger
from phalanx.telemetry.metrics import StorageMetrics

ResultT = TypeVar("ResultT")

# A thread of this pool mostly waits for the group commit it is part of.
_STATE_THREADS = 32
_BLOB_THREADS = 8

LINKED_DATA_LOST = "LINKED_DATA_LOST"
"""The reason where a user's file is not any more what was linked: nothing of storage is damaged."""

_log = get_logger(__name__)


class Operations:
    """What every servicer runs its work with; ``backend`` is the label of the metrics."""

    def __init__(self, backend: str, metrics: StorageMetrics) -> None:
        self._backend = backend
        self._metrics = metrics
        self.state_pool = ThreadPoolExecutor(_STATE_THREADS, "storage-state")
        self.blob_pool = ThreadPoolExecutor(_BLOB_THREADS, "storage-blobs")

    async def state(self, operation: str, function: Callable[[], ResultT]) -> ResultT:
        """Run a short function that reads or writes rows."""
        return await self._run(operation, function, self.state_pool)

    async def blobs(self, operation: str, function: Callable[[], ResultT]) -> ResultT:
        """Run a function that moves blobs."""
        return await self._run(operation, function, self.blob_pool)

    def close(self) -> None:
        """Wait for what runs and end the threads."""
        self.state_pool.shutdown(cancel_futures=True)
        self.blob_pool.shutdown(cancel_futures=True)

    def observe(self, operation: str, started_s: float, error: BaseException | None) -> None:
        """Count an operation that began at ``started_s`` (``time.perf_counter``)."""
        outcome = "ok"
        if error is not None:
            outcome = error.code.value.lower() if isinstance(error, PhalanxError) else "cancelled"
        if isinstance(error, DataLoss):
            if error.reason == LINKED_DATA_LOST:
                _log.warning("linked_data_lost", message=error.message)
            else:
                self.corruption(error.message)
        self._metrics.storage_operation_seconds.labels(operation, self._backend, outcome).observe(
            time.perf_counter() - started_s
        )

    def corruption(self, message: str) -> None:
        """Count something stored that is not what was written."""
        self._metrics.storage_corruptions_total.inc()
        _log.error("corruption", message=message)

    async def _run(
        self, operation: str, function: Callable[[], ResultT], pool: Executor
    ) -> ResultT:
        started_s = time.perf_counter()
        try:
            result = await asyncio.get_running_loop().run_in_executor(pool, function)
        except BaseException as error:
            self.observe(operation, started_s, error)
            raise
        self.observe(operation, started_s, None)
        return result

    async def stream(
        self, operation: str, items: Iterator[ResultT], pool: Executor
    ) -> AsyncGenerator[ResultT]:
        """Yield the items of a blocking iterator, fetching the next while one is being used."""
        started_s = time.perf_counter()
        try:
            async with aclosing(_prefetched(items, pool)) as fetched:
                async for item in fetched:
                    yield item
        except BaseException as error:
            self.observe(operation, started_s, error)
            raise
        self.observe(operation, started_s, None)


async def _prefetched(items: Iterator[ResultT], pool: Executor) -> AsyncGenerator[ResultT]:
    loop = asyncio.get_running_loop()
    upcoming = loop.run_in_executor(pool, next, items, None)
    try:
        while (item := await asyncio.shield(upcoming)) is not None:
            upcoming = loop.run_in_executor(pool, next, items, None)
            yield item
    finally:
        # The iterator must not be closed while a thread is inside it.
        await settled(upcoming)


async def made(
    pool: Executor, make: Callable[[], ResultT], discard: Callable[[ResultT], None]
) -> ResultT:
    """Return what ``make`` makes in a thread; discard it if this call is cancelled meanwhile."""
    loop = asyncio.get_running_loop()
    work = loop.run_in_executor(pool, make)
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:

        async def undo() -> None:
            await settled(work)
            if not work.cancelled() and work.exception() is None:
                await loop.run_in_executor(pool, discard, work.result())

        await to_the_end(undo())
        raise


async def settled(work: asyncio.Future[ResultT]) -> None:
    """Wait for the end of work in a thread, whose outcome nobody needs any more."""
    await asyncio.wait([work])
    if not work.cancelled():
        work.exception()


async def to_the_end(work: Coroutine[Any, Any, None]) -> None:
    """Await ``work``, which goes on where this call is cancelled meanwhile."""
    task = asyncio.create_task(work)
    _going_on.add(task)
    task.add_done_callback(_going_on.discard)
    await asyncio.shield(task)


_going_on: set[asyncio.Task[None]] = set()
"""The event loop itself holds no task."""
