"""The stream between the owner of a job's tasks and a worker."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc.aio

from coordinator.aggregation.core.dispatch.events import Reported, WorkerOpened
from coordinator.aggregation.core.machine import stale_term
from coordinator.aggregation.tasks import HostedTasks, Outbox
from phalanx.errors import InvalidArgument, Unavailable
from phalanx.keys.caller import current_caller
from phalanx.v1 import task_service_pb2 as pb
from phalanx.v1 import task_service_pb2_grpc as pb_grpc

SERVICE = "phalanx.v1.TaskService"
HELLO_TIMEOUT_S = 10.0

Find = Callable[[str], HostedTasks | None]


class TaskServicer(pb_grpc.TaskServiceServicer):
    """Serves `Work`; `find` looks a job up by its id."""

    def __init__(self, find: Find) -> None:
        self._find = find

    async def Work(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]
        """Run one stream from hello to end."""
        hello = await _hello(context)
        job = self._hosted(hello)
        job.given.show(hello.worker_id, hello.given, "hello.given")
        session, outbox = job.open_stream()
        try:
            await context.write(pb.WorkResponse(welcome=pb.WorkWelcome(term=job.ranges.term)))
            job.handle(WorkerOpened(session, hello.worker_id, hello.slots, hello.held))
            await _until_one_ends(
                _receive(context, job, session),
                _send(context, outbox),
                outbox.overflow(),
                job.closed(),
            )
        finally:
            job.close_stream(session)

    def _hosted(self, hello: pb.WorkHello) -> HostedTasks:
        job = self._find(hello.job_id)
        if job is None or job.ranges.term < hello.term:
            raise Unavailable(
                f"job {hello.job_id} is not held here in term {hello.term} yet; try again",
                reason="RANGES_NOT_READY",
                retry_after_s=0.05,
            )
        if job.ranges.term > hello.term:
            raise stale_term(hello.job_id, hello.term, job.ranges.term)
        return job


async def _hello(context: Any) -> pb.WorkHello:
    try:
        async with asyncio.timeout(HELLO_TIMEOUT_S):
            request = await context.read()
    except TimeoutError:
        raise InvalidArgument(f"no hello within {HELLO_TIMEOUT_S:g} s") from None
    if request is grpc.aio.EOF or not request.HasField("hello"):
        raise InvalidArgument("the first message of a stream of tasks must be a hello")
    hello: pb.WorkHello = request.hello
    current_caller().check_member(hello.worker_id, "hello.worker_id")
    return hello


async def _until_one_ends(*works: Any) -> None:
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _receive(context: Any, job: HostedTasks, session: int) -> None:
    while (request := await context.read()) is not grpc.aio.EOF:
        job.handle(Reported(session, request.reports.reports))


async def _send(context: Any, outbox: Outbox) -> None:
    while True:
        message = await outbox.next()
        try:
            await context.write(message)
        except asyncio.InvalidStateError as error:
            raise Unavailable("the stream is closed", reason="STREAM_ENDED") from error
