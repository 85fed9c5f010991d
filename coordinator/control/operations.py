"""Storage operations that the core asks for: terms, rows, models, clearing up.

Each ends with one event to the core. While storage is away, or has no room, they wait, as the core
expects; a job does not fail of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable

from coordinator.control.core import effects as fx
from coordinator.control.core import events as ev
from coordinator.control.core.ending import FINAL_CHECKPOINT_MISSING
from coordinator.control.core.facts import Facts
from coordinator.control.model_writer import ModelWriter, read_metrics, stop_reason
from coordinator.control.store import Store
from coordinator.control.task_results import release_kept, release_values
from phalanx.errors import (
    Aborted,
    FailedPrecondition,
    Internal,
    NotFound,
    PhalanxError,
)
from phalanx.given import KEY_BYTES
from phalanx.tasks import is_program, is_task_set, journal_stream
from phalanx.telemetry.logs import get_logger
from phalanx.v1 import storage_service_pb2 as pb
from phalanx.v1.job_pb2 import Result

_log = get_logger(__name__)

Operation = fx.RaiseTerm | fx.ReadRow | fx.WriteModel


class Operations:
    """Performs operations; `durable` is the state that is safe in the journal."""

    def __init__(self, store: Store, durable: Facts) -> None:
        self._store = store
        self._durable = durable
        self._writer = ModelWriter(store)

    async def perform(self, effect: Operation) -> ev.Event:
        """Return what came of an operation. Raises Aborted (STALE_GENERATION) if another leads."""
        handler: Callable[[], Awaitable[ev.Event]]
        match effect:
            case fx.RaiseTerm():
                handler = lambda: self._raise_term(effect)  # noqa: E731
            case fx.ReadRow():
                handler = lambda: self._read_row(effect.job_id, effect.operation)  # noqa: E731
            case fx.WriteModel():
                handler = lambda: self._write_model(effect)  # noqa: E731

        try:
            return await self._store.insist(handler)
        except PhalanxError as error:
            if isinstance(error, Aborted) and error.reason == "STALE_GENERATION":
                raise
            return ev.OperationFailed(effect.job_id, effect.operation, error.reason, error.message)

    async def remove(self, job_id: str) -> None:
        """Remove what storage keeps of a deleted job. Idempotent."""
        storage, fence = self._store.storage, self._store.fence
        row = pb.DeleteJobRowRequest(job_id=job_id, fence=fence)
        with contextlib.suppress(NotFound):  # it may never have had a term
            await self._store.insist_call(storage.DeleteJobRow, row)
        await release_values(self._store, job_id)
        for stream in (f"logs/{job_id}", f"metrics/{job_id}", journal_stream(job_id)):
            request = pb.DeleteJournalRequest(stream=stream, fence=fence)
            with contextlib.suppress(NotFound):
                await self._store.insist_call(storage.DeleteJournal, request)

    async def release_pins(self, job_id: str) -> None:
        """Say that a job has ended and needs its data set, its model and its code no more to run.

        Storage goes on knowing which data set and model that were: proving the job, and going on
        from it, take them. Of a job that is not there it forgets all.
        """
        ended = job_id in self._durable.jobs
        request = pb.SetPinsRequest(holder=job_id, ended=ended, fence=self._store.fence)
        await self._store.insist_call(self._store.storage.SetPins, request)
        await release_kept(self._store, job_id)

    async def _raise_term(self, effect: fx.RaiseTerm) -> ev.Event:
        storage = self._store.storage
        request = pb.RaiseTermRequest(
            job_id=effect.job_id,
            expected_term=effect.expected_term,
            fence=self._store.fence,
            tells_owners=True,
        )
        try:
            raised = await self._store.call(storage.RaiseTerm, request)
        except (FailedPrecondition, Aborted) as error:
            if error.reason == "STALE_GENERATION":
                raise
            row = await self._read_row(effect.job_id, effect.operation)
            if row.final is not None:
                return row
            return ev.TermRefused(effect.job_id, effect.operation, row.term)
        listing = pb.ListCheckpointsRequest(job_id=effect.job_id)
        listed = await self._store.insist_call(storage.ListCheckpoints, listing)
        return ev.TermRaised(
            effect.job_id,
            effect.operation,
            raised.term,
            tuple(listed.checkpoints),
            secrets.token_bytes(KEY_BYTES) if self._store.has_keys else b"",
        )

    async def _read_row(self, job_id: str, operation: int) -> ev.RowRead:
        request = pb.GetJobRowRequest(job_id=job_id)
        try:
            row = await self._store.call(self._store.storage.GetJobRow, request)
        except NotFound:
            return ev.RowRead(job_id, operation, 0)
        final = row.final_checkpoint if row.HasField("final_checkpoint") else None
        return ev.RowRead(job_id, operation, row.term, final)

    async def _write_model(self, effect: fx.WriteModel) -> ev.Event:
        final = effect.final
        if final is None:
            row = await self._read_row(effect.job_id, effect.operation)
            final = row.final
        if final is None:
            message = "the root reported the end of the job, and storage has no final checkpoint"
            return ev.OperationFailed(
                effect.job_id, effect.operation, FINAL_CHECKPOINT_MISSING, message
            )
        facts = self._durable.job(effect.job_id)
        if is_task_set(facts.spec):
            result = Result(steps=final.step, metrics=read_metrics(final.root_state))
            return ev.ModelWritten(effect.job_id, effect.operation, result, stop_reason(final))
        writer = self._writer
        write = writer.write_outcome if is_program(facts.spec) else writer.write
        try:
            result = await write(facts, final, bit_identical=effect.bit_identical)
        except (PhalanxError, asyncio.CancelledError):
            raise
        except Exception as error:
            # It would end every leader in turn, as each writes the model again.
            _log.exception("model_not_written", job_id=effect.job_id)
            raise Internal(f"the model cannot be written: {type(error).__name__}") from error
        return ev.ModelWritten(effect.job_id, effect.operation, result, stop_reason(final))
