"""Results of independent tasks, and what storage keeps for them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection

from coordinator.control.store import Store
from phalanx.errors import DataLoss
from phalanx.tasks import journal_stream, kept_holder, pins_holder
from phalanx.v1 import storage_service_pb2 as pb
from phalanx.v1.task_service_pb2 import TaskRecord, TaskResult


async def read_results(
    store: Store, job_id: str, wanted: Collection[int]
) -> AsyncIterator[list[TaskResult]]:
    """Yield what came of the tasks so far, in order of time; tasks that were given up come last.

    A task that was given up may have been tried anew since. Raises PhalanxError.
    """
    given_up: dict[int, TaskResult] = {}
    async for stored in store.read(journal_stream(job_id), 0):
        try:
            record = TaskRecord.FromString(stored.payload)
        except ValueError as error:
            text = f"record {stored.sequence} of the results of {job_id} is damaged"
            raise DataLoss(text, reason="JOURNAL_CORRUPT") from error
        for task in record.tried_anew:
            given_up.pop(task, None)
        done = []
        for result in record.results:
            if wanted and result.task not in wanted:
                continue
            if result.HasField("failure"):
                given_up[result.task] = result
            else:
                done.append(result)
        if done:
            yield done
    for result in given_up.values():
        yield [result]


async def release_values(store: Store, job_id: str) -> None:
    """Let go of all that the tasks of a deleted job have left."""
    await _release(store, pins_holder(job_id, ""))


async def release_kept(store: Store, job_id: str) -> None:
    """Let go of what the tasks of a job that has ended have kept for each other."""
    await _release(store, kept_holder(job_id, ""))


async def _release(store: Store, first: str) -> None:
    """Let go of whatever holders pin whose names begin so."""
    request = pb.ListPinsRequest(after_holder=first)
    while True:
        answer = await store.insist_call(store.storage.ListPins, request)
        mine = [holder for holder in answer.holders if holder.startswith(first)]
        for holder in mine:
            release = pb.SetPinsRequest(holder=holder, fence=store.fence)
            await store.insist_call(store.storage.SetPins, release)
        if not mine or len(mine) < len(answer.holders):
            return
        request.after_holder = mine[-1]
