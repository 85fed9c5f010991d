"""Somebody who speaks to the services of a simulated cluster and is none of theirs.

A program with a bug, or of another version, or of somebody who reads the contract and tries what it
forbids: parts of checkpoints that do not fit, writes of terms and generations that are over, what
is damaged, members that say wrong things of themselves. Each answer is checked, and nothing of it
may change what the others compute. For scenes that leave storage alone: some answers tell whether a
call came for the first time.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from phalanx.errors import (
    Aborted,
    AlreadyExists,
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PhalanxError,
    ResourceExhausted,
    Unavailable,
)
from phalanx.rpc.channel import call_with_retry
from phalanx.testing.simulation.clocks import EPOCH_NS, Environment
from phalanx.v1 import (
    dataset_service_pb2,
    job_service_pb2,
    model_service_pb2,
    storage_service_pb2,
    storage_service_pb2_grpc,
)
from tests.simulation import jobs
from tests.simulation.cluster import STORAGE
from tests.simulation.impostor import Impostor
from tests.simulation.neighbour import SHAPE
from tests.simulation.time_lines import clock_off_ns
from tests.simulation.user import ENDED, Job, put_data

NAMESPACE = "strangers"
TWIN, TWIN_ID = "twin", "twin-00000000"
"""Each job of such a name gets the same id."""

FORGOTTEN_AFTER_S = 12.0
"""When a job that is kept for one second is gone: control looks every ten."""

Pb = storage_service_pb2


class Stranger(Impostor):
    """Runs in a process of its own."""

    name, namespace = "stranger", NAMESPACE
    _leaves_twin = False

    def install(self, environment: Environment) -> None:
        """Have two jobs get the same id, as chance may have it once in a long time."""
        from coordinator.control import submission

        made = submission.new_id
        environment.replace(
            submission,
            "new_id",
            lambda name: TWIN_ID if name.startswith(TWIN) else made(name),
        )

    async def _run(self) -> None:
        await put_data(STORAGE, self._chance, NAMESPACE)
        errands: tuple[Callable[[], Awaitable[None]], ...] = (
            self._registers_what_does_not_fit,
            self._writes_for_terms_that_are_over,
            self._takes_leases,
            self._writes_journals,
            self._reads_what_is_damaged,
            self._names_what_there_is_not,
            self._submits_twins,
            self._goes_on_from_another_job,
            self._goes_on_from_what_is_damaged,
            self._lets_a_job_be_forgotten,
            self._claims_to_be_a_worker,
            self._claims_to_be_an_aggregator,
            self._knows_a_later_leader,
            self._claims_to_deliver,
        )
        while not self._cluster.healed or self.errands < len(errands):
            for errand in self._chance.sample(errands, len(errands)):
                with suppress(Unavailable, DeadlineExceeded, ResourceExhausted):
                    await errand()
                    self.errands += 1
                await asyncio.sleep(self._chance.uniform(0.1, 0.4))

    # Checkpoints

    async def _registers_what_does_not_fit(self) -> None:
        """Parts that do not belong together make no checkpoint."""
        job_id, digest = self._job_id(), await self._put(b"part" * 8)
        first = _part(job_id, 0, digest, first_element=0)
        await self._told(NotFound, "CommitCheckpoint", first)
        await self._storage("RaiseTerm", Pb.RaiseTermRequest(job_id=job_id))
        missing = hashlib.sha256(b"nothing").hexdigest()
        await self._told(
            FailedPrecondition, "CommitCheckpoint", _part(job_id, 0, missing), "BLOB_MISSING"
        )
        small = _part(job_id, 0, digest, size_bytes=31)
        await self._told(FailedPrecondition, "CommitCheckpoint", small, "CHECKPOINT_MISMATCH")
        await self._storage("CommitCheckpoint", first)
        again = await self._storage("CommitCheckpoint", first)
        self._demand(not again.complete, "a checkpoint is whole with one part of two")
        for wrong in (
            _changed(first, range_count=3),
            _changed(_part(job_id, 1, digest), spec_sha256="0" * 64),
            _part(job_id, 1, digest, first_element=9),
        ):
            await self._told(FailedPrecondition, "CommitCheckpoint", wrong, "CHECKPOINT_MISMATCH")
        other = _part(job_id, 0, digest, element_count=3)
        await self._told(AlreadyExists, "CommitCheckpoint", other, "PART_CONFLICT")
        other = _changed(first, root_state="{}")
        await self._told(AlreadyExists, "CommitCheckpoint", other, "PART_CONFLICT")
        whole = await self._storage("CommitCheckpoint", _part(job_id, 1, digest, first_element=4))
        self._demand(whole.complete, "a checkpoint with all of its parts is not whole")
        old = _changed(first, step=1)
        await self._told(Aborted, "CommitCheckpoint", old, "SUPERSEDED")
        await self._storage("DeleteJobRow", Pb.DeleteJobRowRequest(job_id=job_id))

    async def _writes_for_terms_that_are_over(self) -> None:
        """What belongs to another term is refused, and everything after a final checkpoint."""
        job_id, digest = self._job_id(), await self._put(b"part" * 8)
        raised = Pb.RaiseTermRequest(job_id=job_id)
        await self._storage("RaiseTerm", raised)
        await self._told(Aborted, "RaiseTerm", raised, "STALE_TERM")
        await self._storage("RaiseTerm", _changed(raised, expected_term=1))
        part = _changed(_part(job_id, 0, digest), range_count=1, term=2)
        await self._told(Aborted, "CommitCheckpoint", _changed(part, term=1), "STALE_TERM")
        for step in (2, 3, 4, 5):
            await self._storage("CommitCheckpoint", _changed(part, step=step, keep=2))
        listing = Pb.ListCheckpointsRequest(job_id=job_id)
        listed = (await self._storage("ListCheckpoints", listing)).checkpoints
        self._demand([each.step for each in listed] == [5, 4], f"two are to be kept, not {listed}")
        await self._storage("CommitCheckpoint", _changed(part, step=6, final=True))
        late = _changed(part, step=7)
        await self._told(FailedPrecondition, "CommitCheckpoint", late, "FINAL_CHECKPOINT")
        late = _changed(raised, expected_term=2)
        await self._told(FailedPrecondition, "RaiseTerm", late, "FINAL_CHECKPOINT")
        await self._storage("DeleteJobRow", Pb.DeleteJobRowRequest(job_id=job_id))

    # Leases and journals

    async def _takes_leases(self) -> None:
        """A lease has one holder; who is not it is told so."""
        name = f"strangers/{self._next()}"
        nobody = await self._storage("GetLease", Pb.GetLeaseRequest(name=name))
        self._demand(nobody.lease.holder == "", f"somebody holds a new lease: {nobody}")
        renew = Pb.RenewLeaseRequest(name=name, holder="one", token=1)
        await self._told(NotFound, "RenewLease", renew)
        fenced = Pb.AppendJournalRequest(stream=name, expected_sequence=-1, records=[b"late"])
        fenced.fence.lease, fenced.fence.token = name, 1
        await self._told(Aborted, "AppendJournal", fenced, "STALE_GENERATION")
        free = Pb.ReleaseLeaseRequest(name=name, holder="one", token=1)
        await self._storage("ReleaseLease", free)  # there is nothing to let go
        one = Pb.AcquireLeaseRequest(name=name, holder="one")
        first = await self._storage("AcquireLease", one)
        again = await self._storage("AcquireLease", one)
        self._demand(again.lease.token == first.lease.token + 1, "a grant has the token before")
        other = Pb.AcquireLeaseRequest(name=name, holder="two")
        refused = await self._storage("AcquireLease", other)
        self._demand(not refused.acquired, "a lease that is held was given away")
        await self._told(Aborted, "RenewLease", renew, "STALE_GENERATION")
        await self._storage("RenewLease", _changed(renew, token=2))
        await self._told(Aborted, "AppendJournal", fenced, "STALE_GENERATION")
        await self._storage("ReleaseLease", _changed(free, token=2))
        await self._told(Aborted, "AppendJournal", fenced, "STALE_GENERATION")
        taken = await self._storage("AcquireLease", other)
        self._demand(taken.acquired and taken.lease.token == 3, f"a free lease: {taken}")

    async def _writes_journals(self) -> None:
        """A record has one place, and what is cut off stays so."""
        stream = f"strangers/{self._next()}"
        append = Pb.AppendJournalRequest(stream=stream, records=[b"a", b"b" * 70, b"c"])
        digests = [hashlib.sha256(bytes([n])).hexdigest() for n in range(6)]
        append.records.append("".join(digests).encode())
        append.records.append(f"1{digests[0]}f".encode())
        await self._storage("AppendJournal", append)
        await self._told(Aborted, "AppendJournal", append, "SEQUENCE_MISMATCH")
        nothing = Pb.AppendJournalRequest(stream=stream, expected_sequence=-1)
        count = len(append.records)
        answer = await self._storage("AppendJournal", nothing)
        self._demand(answer.next_sequence == count, f"{answer} after {count} records")
        cut = Pb.TruncateJournalRequest(stream=stream, before_sequence=2)
        await self._storage("TruncateJournal", cut)
        await self._told(InvalidArgument, "TruncateJournal", _changed(cut, before_sequence=99))
        read = await self._read(stream)
        self._demand(read == list(append.records[2:]), f"after the cut there is {read}")
        await self._storage("DeleteJournal", Pb.DeleteJournalRequest(stream=stream))

    async def _reads_what_is_damaged(self) -> None:
        """A record that lost a bit, or that is gone, is never taken for what was written."""
        for damage in (
            "UPDATE records SET payload = x'00' WHERE stream = ? AND sequence = 1",
            "DELETE FROM records WHERE stream = ? AND sequence = 1",
        ):
            stream = f"strangers/{self._next()}"
            append = Pb.AppendJournalRequest(stream=stream, records=[b"a", b"b", b"c"])
            await self._storage("AppendJournal", append)
            connection = self._cluster.storage_machine.connection
            find = "SELECT id FROM streams WHERE name = ?"
            connection.execute(damage, connection.execute(find, (stream,)).fetchone())
            await self._expect(DataLoss, self._read(stream))
            await self._storage("DeleteJournal", Pb.DeleteJournalRequest(stream=stream))

    # Names

    async def _names_what_there_is_not(self) -> None:
        """What is in use stays, and models are whole or not there."""
        make, name = model_service_pb2, f"model-{self._next()}"
        digest = await self._put(b"part" * 8)
        model = make.CreateModelRequest(request_id=name)
        model.model.namespace, model.model.name = NAMESPACE, name
        model.model.files.add(path="parameters.bin", digest=digest)
        missing = _changed(model)
        missing.model.files.add(path="more", digest=hashlib.sha256(b"nothing").hexdigest())
        await self._expect(FailedPrecondition, self._models("CreateModel", missing))
        twice = _changed(model)
        twice.model.files.add(path="parameters.bin", digest=digest)
        await self._expect(InvalidArgument, self._models("CreateModel", twice))
        made = (await self._models("CreateModel", model)).model
        self._demand(made.version == 1, f"the first version of {name} is {made.version}")
        data = dataset_service_pb2.DeleteDatasetRequest(
            namespace=NAMESPACE, name=jobs.DATASET, request_id=f"drop-{name}"
        )
        for holders in range(1, 6):
            pins = Pb.SetPinsRequest(holder=f"{name}-{holders}")
            pins.pins.add().dataset.CopyFrom(
                Pb.PinnedVersion(namespace=NAMESPACE, name=jobs.DATASET, version=1)
            )
            await self._storage("SetPins", pins)
        await self._expect(FailedPrecondition, self._data("DeleteDataset", data))
        for holders in range(1, 6):
            await self._storage("SetPins", Pb.SetPinsRequest(holder=f"{name}-{holders}"))
        await self._told(InvalidArgument, "SetPins", Pb.SetPinsRequest(holder="two words"))

    # Jobs

    async def _submits_twins(self) -> None:
        """A job whose id is that of another one is refused; the other one goes on."""
        if self._leaves_twin:  # something was broken the last time
            self._number += 1
            with suppress(NotFound):
                await self._remove_twin()
        self._leaves_twin = True
        self._number += 1
        await self._twin(f"{TWIN}-{self._number}")
        self._number += 1
        await self._expect(AlreadyExists, self._twin(f"{TWIN}-{self._number}"))
        await self._remove_twin()
        self._leaves_twin = False

    async def _remove_twin(self) -> None:
        cancel = job_service_pb2.CancelJobRequest(job_id=TWIN_ID, request_id=f"c-{self._number}")
        await self._attempt(self._control("CancelJob", cancel))
        delete = job_service_pb2.DeleteJobRequest(job_id=TWIN_ID, request_id=f"{self._number}")
        await self._control("DeleteJob", delete)

    async def _twin(self, request_id: str) -> Any:
        spec = jobs.job_spec(replace(SHAPE, steps=60), f"{TWIN}-{SHAPE.elements}")
        spec.namespace = NAMESPACE
        request = job_service_pb2.SubmitJobRequest(spec=spec, request_id=request_id)
        return (await self._control("SubmitJob", request)).job

    async def _goes_on_from_another_job(self) -> None:
        """A job that takes over all state of another one ends with the bits of one long one."""
        short = replace(SHAPE, steps=5, optimizer="momentum")
        first = await self._ended(await self._submit(short))

        def goes_on(spec: Any) -> None:
            spec.train.start.job = first.id

        longer = replace(short, steps=11)
        last = await self._ended(await self._submit(longer, goes_on))
        self._judge_result(last, longer)

    async def _goes_on_from_what_is_damaged(self) -> None:
        """A job that is to take over a checkpoint which lost a bit does not begin with anything
        else."""
        first = await self._ended(await self._submit(replace(SHAPE, elements=160)))
        listing = Pb.ListCheckpointsRequest(job_id=first.id)
        listed = await self._storage("ListCheckpoints", listing)
        for part in listed.checkpoints[0].parts:
            self._cluster.storage_machine.disk.damage(part.digest, self._chance.randrange(1 << 10))

        def goes_on(spec: Any) -> None:
            spec.train.start.job = first.id

        await self._fails(replace(SHAPE, elements=160, steps=11), goes_on)

    async def _fails(self, shape: jobs.Shape, change: Callable[[Any], None]) -> None:
        try:
            job = await self._submit(shape, change)
        except NotFound:
            return  # somebody has read it by now, and storage knows
        request = job_service_pb2.GetJobRequest(job_id=job.id)
        while job.state not in ENDED:
            await asyncio.sleep(0.5)
            job = (await self._control("GetJob", request)).job
        told = (Job.State.Name(job.state), job.reason)
        self._demand(told == ("STATE_FAILED", "START_NOT_USABLE"), f"{job.id} ended as {told}")

    async def _lets_a_job_be_forgotten(self) -> None:
        """An ended job is there as long as it was to be kept, and not much longer.

        That goes by the wall clock of who leads, who takes one that is behind by less than a minute
        for right: then it may be there a little longer. Whoever has just begun to lead looks first.
        """

        def forget_soon(spec: Any) -> None:
            spec.retain.FromSeconds(1)

        job = await self._submit(replace(SHAPE, steps=60), forget_soon)
        cancel = job_service_pb2.CancelJobRequest(job_id=job.id, request_id=f"forget-{job.id}")
        job = (await self._control("CancelJob", cancel)).job
        due_ns = job.end_time.ToNanoseconds() + int(FORGOTTEN_AFTER_S * 1e9)
        await asyncio.sleep(FORGOTTEN_AFTER_S)
        late_for = 0
        while True:
            is_due = self._slowest_clock_ns() >= due_ns
            try:
                request = job_service_pb2.GetJobRequest(job_id=job.id)
                found = (await self._control("GetJob", request)).job
            except NotFound:
                return
            self._demand(found.generation != late_for, f"nobody forgets {job.id}: {found}")
            late_for = found.generation if is_due else 0
            await asyncio.sleep(1.0)

    def _slowest_clock_ns(self) -> int:
        """What the last of the clocks of control shows; none of them jumps where she is."""
        world = self._cluster.world
        off_ns = min(clock_off_ns(world.seed, name) for name in self._cluster.controls)
        return EPOCH_NS + int(world.now_s * 1e9) + off_ns

    async def _ended(self, job: Any) -> Any:
        request = job_service_pb2.GetJobRequest(job_id=job.id)
        while job.state not in ENDED:
            await asyncio.sleep(0.5)
            job = (await self._control("GetJob", request)).job
        self._demand(job.state == Job.STATE_SUCCEEDED, f"{job.id}: {job.reason}: {job.message}")
        return job

    # Inside

    def _next(self) -> int:
        self._number += 1
        return self._number

    def _job_id(self) -> str:
        return f"strange-{self._next()}"

    async def _storage(self, method: str, request: Any) -> Any:
        stub = storage_service_pb2_grpc.StorageServiceStub(self._channel(STORAGE))
        return await call_with_retry(getattr(stub, method), request, timeout_s=10.0)

    async def _told(
        self, error: type[PhalanxError], method: str, request: Any, reason: str = ""
    ) -> None:
        """A call is refused, for this reason."""
        try:
            answer = await self._storage(method, request)
        except error as refused:
            self._demand(
                reason in ("", refused.reason), f"{method} was refused as {refused.reason}"
            )
            return
        self._demand(False, f"{method} should have been refused as {reason}: {answer}")

    async def _put(self, content: bytes) -> str:
        stub = storage_service_pb2_grpc.StorageServiceStub(self._channel(STORAGE))

        async def attempt(request: Any, *, timeout: float) -> Any:
            async def messages() -> Any:
                yield request

            return await stub.PutBlob(messages(), timeout=timeout)

        first = Pb.PutBlobRequest(expected_bytes=len(content), chunk=content)
        digest: str = (await call_with_retry(attempt, first, timeout_s=10.0)).digest
        return digest

    async def _read(self, stream: str) -> list[bytes]:
        stub = storage_service_pb2_grpc.StorageServiceStub(self._channel(STORAGE))

        async def attempt(request: Any, *, timeout: float) -> Any:
            found: list[bytes] = []
            async for answer in stub.ReadJournal(request, timeout=timeout):
                found += [record.payload for record in answer.records]
            return found

        request = Pb.ReadJournalRequest(stream=stream)
        read: list[bytes] = await call_with_retry(attempt, request, timeout_s=10.0)
        return read


def _part(job_id: str, index: int, digest: str, **changed: Any) -> Any:
    """Register one of two parts of a checkpoint."""
    part = Pb.CheckpointPart(
        range=index,
        first_element=4 * index,
        element_count=4,
        digest=digest,
        size_bytes=32,
        parameters_length=16,
    )
    return Pb.CommitCheckpointRequest(
        job_id=job_id, term=1, step=2, range_count=2, part=_changed(part, **changed)
    )


def _changed(message: Any, **changed: Any) -> Any:
    made = type(message)()
    made.CopyFrom(message)
    for name, value in changed.items():
        setattr(made, name, value)
    return made
