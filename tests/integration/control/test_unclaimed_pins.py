"""What a leader pinned for a job that it did not live to take is let go by the next one."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio
import pytest

from coordinator.control import leader
from coordinator.control.core.facts import Facts
from coordinator.control.leader import Leader
from coordinator.control.operations import Operations
from coordinator.control.pins import unclaimed
from coordinator.control.store import Store
from phalanx.errors import Unimplemented
from phalanx.ids import new_id
from phalanx.v1 import dataset_service_pb2, job_service_pb2
from phalanx.v1 import storage_service_pb2 as pb

GUARD_S = 30.0


async def holders(cluster: Any) -> list[str]:
    answer = await cluster.store().ListPins(pb.ListPinsRequest(), timeout=GUARD_S)
    return list(answer.holders)


async def wait_for_holders(cluster: Any, wanted: list[str]) -> None:
    async with asyncio.timeout(GUARD_S):
        while await holders(cluster) != sorted(wanted):
            await asyncio.sleep(0.02)


async def test_a_leader_that_dies_between_pins_and_journal_leaves_none(
    storage_only: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await storage_only.start_control("first")
    taken = await storage_only.submit()
    blob = await storage_only.put_blob(b"a wheel")
    # Not control's: the pin of a wheel.
    pins = pb.SetPinsRequest(holder="code.0123456789abcdef", pins=[pb.Pin(blob=blob)])
    await storage_only.store().SetPins(pins, timeout=GUARD_S)

    reached = asyncio.Event()

    async def dies(*_: Any) -> None:
        reached.set()
        await asyncio.Event().wait()

    with monkeypatch.context() as dying:
        dying.setattr(Leader, "request", dies)
        # Killed, it lets go of nothing.
        dying.setattr("coordinator.control.submission.Submissions.discard", dies)
        submitting = asyncio.create_task(storage_only.submit())
        await asyncio.wait_for(reached.wait(), GUARD_S)
        left = set(await holders(storage_only)) - {taken.id, pins.holder}
        assert len(left) == 1
        submitting.cancel()
        await storage_only.stop_control()
    assert left <= set(await holders(storage_only))

    await storage_only.start_control("second")
    await wait_for_holders(storage_only, [taken.id, pins.holder])


async def test_pins_of_a_job_that_ended_with_its_leader_go_too(
    storage_only: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await storage_only.start_control("first")
    queued, cancelled = await storage_only.submit(), await storage_only.submit()

    async def dies(*_: Any) -> None:
        await asyncio.Event().wait()

    with monkeypatch.context() as dying:
        dying.setattr(Operations, "release_pins", dies)
        request = job_service_pb2.CancelJobRequest(job_id=cancelled.id)
        await storage_only.jobs().CancelJob(request, timeout=GUARD_S)
        await storage_only.stop_control()
    assert cancelled.id in await holders(storage_only)

    await storage_only.start_control("second")
    await wait_for_holders(storage_only, [queued.id])


@pytest.mark.parametrize("storage_answers", [True, False])
async def test_what_a_deleted_job_has_used_can_be_deleted_at_once(
    storage_only: Any, monkeypatch: pytest.MonkeyPatch, storage_answers: bool
) -> None:
    """Whoever deletes a job waits for storage to forget it, but not for a storage that is away."""
    remove = Operations.remove
    reached, go_on = asyncio.Event(), asyncio.Event()

    async def late(operations: Operations, job_id: str) -> None:
        reached.set()
        await go_on.wait()
        await remove(operations, job_id)

    monkeypatch.setattr(Operations, "remove", late)
    monkeypatch.setattr(leader, "REMOVAL_WAIT_S", GUARD_S if storage_answers else 0.01)
    await storage_only.start_control("first")
    job = await storage_only.submit()
    jobs, datasets = storage_only.jobs(), storage_only.datasets()
    cancel = job_service_pb2.CancelJobRequest(job_id=job.id)
    await jobs.CancelJob(cancel, timeout=GUARD_S)
    await wait_for_holders(storage_only, [])
    delete = dataset_service_pb2.DeleteDatasetRequest(name=job.spec.data.name)
    with pytest.raises(grpc.aio.AioRpcError, match=f"was used by {job.id}"):
        await datasets.DeleteDataset(delete, timeout=GUARD_S)

    forget = jobs.DeleteJob(job_service_pb2.DeleteJobRequest(job_id=job.id), timeout=GUARD_S)
    await asyncio.wait_for(reached.wait(), GUARD_S)
    if storage_answers:
        with pytest.raises(grpc.aio.AioRpcError, match="there is no job"):
            await jobs.GetJob(job_service_pb2.GetJobRequest(job_id=job.id), timeout=GUARD_S)
        assert not forget.done()
        go_on.set()
    await forget
    if storage_answers:
        await datasets.DeleteDataset(delete, timeout=GUARD_S)


async def test_pins_that_could_not_be_let_go_go_with_the_garbage(
    storage_only: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Storage was away when a submission that nobody took was to let go of them."""
    collected = asyncio.Event()
    let_go = Leader._let_go_of_pins

    async def counted(leader: Leader) -> None:
        await let_go(leader)
        collected.set()

    monkeypatch.setattr(Leader, "_let_go_of_pins", counted)
    await storage_only.start_control("first", collect_garbage_every_s=0.05)
    taken = await storage_only.submit()
    await asyncio.wait_for(collected.wait(), GUARD_S)
    blob = await storage_only.put_blob(b"code")
    left = pb.SetPinsRequest(holder=new_id("job"), pins=[pb.Pin(blob=blob)])
    await storage_only.store().SetPins(left, timeout=GUARD_S)
    await wait_for_holders(storage_only, [taken.id])

    reached, go_on = asyncio.Event(), asyncio.Event()
    request = Leader.request

    async def waits(leader: Leader, make: Any) -> Any:
        reached.set()
        await go_on.wait()
        return await request(leader, make)

    monkeypatch.setattr(Leader, "request", waits)
    submitting = asyncio.create_task(storage_only.submit())
    await asyncio.wait_for(reached.wait(), GUARD_S)
    for _ in range(2):
        collected.clear()
        await asyncio.wait_for(collected.wait(), GUARD_S)
    assert len(await holders(storage_only)) == 2, "those of a submission under way stay"
    go_on.set()
    assert (await submitting).id in await holders(storage_only)


async def test_what_storage_keeps_of_a_removed_job_goes_although_its_leader_died(
    storage_only: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await storage_only.start_control("first", snapshot_every_records=10)
    job = await storage_only.submit()
    row = pb.RaiseTermRequest(job_id=job.id, expected_term=0)
    await storage_only.store().RaiseTerm(row, timeout=GUARD_S)
    await storage_only.jobs().CancelJob(
        job_service_pb2.CancelJobRequest(job_id=job.id), timeout=GUARD_S
    )

    async def dies(*_: Any) -> None:
        await asyncio.Event().wait()

    with monkeypatch.context() as dying:
        dying.setattr(Operations, "remove", dies)
        await storage_only.jobs().DeleteJob(
            job_service_pb2.DeleteJobRequest(job_id=job.id), timeout=GUARD_S
        )
        # The journal is written anew in between.
        for _ in range(12):
            await storage_only.submit()
        await storage_only.stop_control()
    wanted = pb.GetJobRowRequest(job_id=job.id)
    await storage_only.store().GetJobRow(wanted, timeout=GUARD_S)

    await storage_only.start_control("second")
    async with asyncio.timeout(GUARD_S):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            while True:
                await storage_only.store().GetJobRow(wanted, timeout=GUARD_S)
                await asyncio.sleep(0.02)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    async with asyncio.timeout(GUARD_S):
        while storage_only.control.leading().durable.removing:
            await asyncio.sleep(0.02)


async def test_a_storage_that_cannot_tell_keeps_nobody_from_leading(storage_only: Any) -> None:
    store = Store(storage_only.storage_address)

    async def unknown(*_: Any, **__: Any) -> Any:
        raise Unimplemented("ListPins is not known")

    store.call = unknown  # type: ignore[method-assign]
    try:
        assert await unclaimed(store, Facts(), ()) == []
    finally:
        await store.close()
