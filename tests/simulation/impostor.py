"""Somebody who claims to be a member of a simulated cluster, and says what no member would.

Members of another version, or with a bug, or that were cut off for very long, speak of jobs that
they do not have, of terms that never were, and of things that nobody asked them. Whoever says them
is refused, or told to let go, or not heard; nothing of it may change what the others compute.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any

import grpc.aio

from phalanx.frames import encode_request
from phalanx.v1 import aggregation_service_pb2 as exchange
from phalanx.v1 import coordination_service_pb2 as pb
from phalanx.v1 import job_service_pb2, training_pb2
from phalanx.v1.coordination_service_pb2_grpc import CoordinationServiceStub
from phalanx.v1.job_pb2 import Job
from tests.simulation import jobs
from tests.simulation.neighbour import Neighbour

FINGERPRINT = "of no machine"
STAYS_S = 0.5
BETWEEN_S = 0.05
ANOTHER_TERM = 1 << 20
TERMS_TRIED = (1,)
EXCHANGE = "/phalanx.v1.AggregationService/Exchange"

Request = pb.SessionRequest


class Impostor(Neighbour):
    """What of it there is to be done; `stranger` does it."""

    async def _claims_to_be_a_worker(self) -> None:
        """Its bits are not those of any job, so it is given nothing; then it says all the same."""
        job_id = (await self._some_job()).id
        hello = pb.WorkerHello(
            worker_id="impostor", incarnation=str(self._number), fingerprint=FINGERPRINT, slots=1
        )
        hello.held_jobs.add(job_id=job_id, term=ANOTHER_TERM)
        hello.held_jobs.add(job_id="no-job", term=1)
        told = await self._session(Request(worker_hello=hello), *_claims(job_id))
        revoked = {each.revoke_job.job_id for each in told if each.HasField("revoke_job")}
        self._demand(not told or revoked >= {"no-job"}, f"it may keep what it claims: {told}")
        for wrong in (
            pb.WorkerHello(worker_id="impostor", incarnation="0", slots=0),
            pb.WorkerHello(worker_id="../impostor", incarnation="0", slots=1),
            pb.WorkerHello(worker_id="impostor", slots=1),
        ):
            await self._turned_away(Request(worker_hello=wrong))

    async def _claims_to_be_an_aggregator(self) -> None:
        """It owns nothing, and what it says of what others own is not believed. Given ranges it
        would be; so it leaves, and another one takes them. Of a term that is still to begin it says
        nothing, as it may be given ranges of it while it speaks."""
        job = await self._some_job()
        job_id, begun = job.id, job.state != Job.STATE_QUEUED
        hello = pb.AggregatorHello(
            aggregator_id="impostor",
            incarnation=str(self._number),
            address="impostor:1",
            fingerprint=jobs.FINGERPRINTS[0],
        )
        hello.held_ranges.add(job_id=job_id, term=ANOTHER_TERM, range_indexes=[0])
        hello.held_ranges.add(job_id="no-job", term=1, range_indexes=[0])
        claims = _claims(job_id, (ANOTHER_TERM, 1) if begun else (ANOTHER_TERM,))
        told = await self._session(Request(aggregator_hello=hello), *claims)
        released = {each.release_ranges.job_id for each in told if each.HasField("release_ranges")}
        owns = any(each.HasField("assign_ranges") for each in told)
        kept = told and not owns and not released >= {"no-job"}
        self._demand(not kept, f"it may keep what it claims: {told}")
        for wrong in (
            pb.AggregatorHello(aggregator_id="impostor", incarnation="0"),
            pb.AggregatorHello(aggregator_id="", incarnation="0", address="impostor:1"),
        ):
            await self._turned_away(Request(aggregator_hello=wrong))

    async def _knows_a_later_leader(self) -> None:
        """Whoever leads looks whether he still does, and goes on if so."""
        later = pb.WorkerHello(
            worker_id="impostor", incarnation="0", slots=1, generation=ANOTHER_TERM
        )
        await self._turned_away(Request(worker_hello=later))

    async def _claims_to_deliver(self) -> None:
        """Contributions of a term or a round that there is not end the stream that they come on,
        and those of a round that is over change nothing."""
        job_id = (await self._some_job()).id
        node = training_pb2.TreeNode(first=0, span=1)
        for term in TERMS_TRIED:
            frame = {"term": term, "node": node, "vector": "gradient", "element_count": 1}
            go = training_pb2.GoRecord(term=term, action=training_pb2.GoRecord.ACTION_INITIALISE)
            for message in (
                {"frame": exchange.ContributionFrame(**{**frame, "term": ANOTHER_TERM})},
                {"frame": exchange.ContributionFrame(**frame, step=1 << 30)},
                {"frame": exchange.ContributionFrame(**frame)},
                {"go_record": go},
                {"starts_wanted": exchange.StartsWanted(term=ANOTHER_TERM)},
                {"recall": exchange.Recall(term=term)},
            ):
                header = exchange.ExchangeRequestHeader(**message)
                for address in self._cluster.aggregator_addresses:
                    await self._stream(address, job_id, term, header)

    async def _stream(self, address: str, job_id: str, term: int, header: Any) -> None:
        """Send one message to an aggregator."""
        hello = exchange.ExchangeHello(job_id=job_id, term=term, worker_id="impostor")
        first = exchange.ExchangeRequestHeader(hello=hello)

        async def said() -> AsyncIterator[bytes]:
            yield encode_request(first)
            yield encode_request(header, b"" if header.WhichOneof("message") == "frame" else None)
            await asyncio.sleep(BETWEEN_S)

        call = self._channel(address).stream_stream(EXCHANGE)
        with suppress(grpc.aio.AioRpcError):
            async for _ in call(said(), timeout=1.0):
                pass

    async def _some_job(self) -> Job:
        request = job_service_pb2.ListJobsRequest(namespace="default")
        jobs: Sequence[Job] = (await self._control("ListJobs", request)).jobs
        return jobs[0] if jobs else Job(id="no-job")

    async def _turned_away(self, hello: Request) -> None:
        told = await self._session(hello)
        self._demand(not told, f"this was welcomed: {hello}")

    async def _session(self, *messages: Request) -> list[pb.SessionResponse]:
        """Say something to whoever leads; returns what was answered: nothing where one is turned
        away."""
        told: list[pb.SessionResponse] = []
        for address in self._cluster.control_addresses:
            stub: Any = CoordinationServiceStub(self._channel(address))
            session = stub.Session(_said(messages), timeout=5.0)
            try:
                async for answer in session:
                    told.append(answer)
                    if answer.HasField("assign_ranges"):
                        session.cancel()
                        break
            except grpc.aio.AioRpcError:
                pass  # it does not lead, or does not want to hear
        return told


async def _said(messages: tuple[Request, ...]) -> AsyncIterator[Request]:
    for message in messages:
        yield message
        await asyncio.sleep(BETWEEN_S)
    await asyncio.sleep(STAYS_S)


def _claims(job_id: str, terms: Sequence[int] = (ANOTHER_TERM, 1)) -> list[Request]:
    """What a member may say, of a job that it does not have and of one that there is not."""
    said: list[Request] = [Request()]
    for job, term in (("no-job", 1), *((job_id, term) for term in terms)):
        progress = pb.WorkerJobProgress(job_id=job, term=term, step=9)
        report = pb.JobReport(
            job_id=job, term=term, outcome=pb.JobReport.OUTCOME_FAILED, reason="IMPOSTOR"
        )
        said += [
            Request(heartbeat=pb.Heartbeat(jobs=[progress])),
            Request(job_described=pb.JobDescribed(job_id=job)),
            Request(
                worker_job_ready=pb.WorkerJobReady(job_id=job, term=term, leaf_sha256="2" * 64)
            ),
            Request(leaf_failed=pb.LeafFailed(job_id=job, term=term, shard=1 << 20)),
            Request(ranges_ready=pb.RangesReady(job_id=job, term=term)),
            Request(job_report=report),
            Request(copies_started=pb.CopiesStarted(job_id=job, term=term, shards=[0])),
            Request(worker_job_released=pb.WorkerJobReleased(job_id=job, term=term)),
        ]
    return [*said, Request(drain_requested=pb.DrainRequested())]
