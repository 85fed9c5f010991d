"""Blocking work in threads: nothing is lost or leaked when the caller goes away."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from prometheus_client import CollectorRegistry

from phalanx.errors import DataLoss, NotFound
from phalanx.telemetry.metrics import StorageMetrics
from storage.service.operations import Operations, made

GUARD_S = 30
COUNT = "phalanx_storage_operation_seconds_count"


@pytest.fixture
def registry():
    return CollectorRegistry()


@pytest.fixture
def operations(registry):
    operations = Operations("embedded", StorageMetrics(registry))
    yield operations
    operations.close()


def raising(error):
    def function():
        raise error

    return function


async def test_operations_are_counted_by_outcome(operations, registry):
    assert await operations.state("read", lambda: 7) == 7
    with pytest.raises(NotFound):
        await operations.state("read", raising(NotFound("no")))
    with pytest.raises(DataLoss):
        await operations.blobs("read", raising(DataLoss("damaged")))
    for outcome in ("ok", "not_found", "data_loss"):
        labels = {"operation": "read", "backend": "embedded", "outcome": outcome}
        assert registry.get_sample_value(COUNT, labels) == 1
    assert registry.get_sample_value("phalanx_storage_corruptions_total") == 1


async def test_a_stream_fetches_the_next_item_while_one_is_used(operations):
    begun = [threading.Event() for _ in range(3)]

    def items():
        for number, event in enumerate(begun):
            event.set()
            yield number

    received = []
    async for item in operations.stream("read", items(), operations.state_pool):
        if item < 2:
            assert await asyncio.to_thread(begun[item + 1].wait, GUARD_S)
        received.append(item)
    assert received == [0, 1, 2]


async def test_an_error_in_a_stream_comes_after_the_items_before_it(operations, registry):
    def items():
        yield 1
        raise DataLoss("damaged")

    received = []
    with pytest.raises(DataLoss):
        async for item in operations.stream("read", items(), operations.state_pool):
            received += [item]
    assert received == [1]
    labels = {"operation": "read", "backend": "embedded", "outcome": "data_loss"}
    assert registry.get_sample_value(COUNT, labels) == 1


async def test_a_stream_left_early_waits_for_its_thread(operations):
    inside, leave, closed = threading.Event(), threading.Event(), threading.Event()

    def items():
        try:
            yield 1
            inside.set()
            assert leave.wait(GUARD_S)
            yield 2
        finally:
            closed.set()

    iterator = items()
    stream = operations.stream("read", iterator, operations.state_pool)
    assert await anext(stream) == 1
    assert await asyncio.to_thread(inside.wait, GUARD_S)
    closing = asyncio.create_task(stream.aclose())
    await asyncio.sleep(0)
    assert not closing.done()
    leave.set()
    await closing
    iterator.close()
    assert closed.is_set()


@pytest.mark.parametrize("fails", [False, True])
async def test_what_is_made_for_a_caller_that_left_is_discarded(fails):
    entered, leave = threading.Event(), threading.Event()
    discarded = []

    def make():
        entered.set()
        assert leave.wait(GUARD_S)
        if fails:
            raise NotFound("no")
        return "thing"

    with ThreadPoolExecutor(1) as pool:
        task = asyncio.create_task(made(pool, make, discarded.append))
        assert await asyncio.to_thread(entered.wait, GUARD_S)
        task.cancel()
        await asyncio.sleep(0)
        leave.set()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert discarded == ([] if fails else ["thing"])
