"""JobService: what people and programs ask about jobs."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, TypeVar

from google.protobuf.message import Message

from coordinator.control.config import checked_request_id
from coordinator.control.core import events as ev
from coordinator.control.core.facts import JobFacts
from coordinator.control.core.lifecycle import ENDED
from coordinator.control.core.quotas import check_jobs
from coordinator.control.core.views import job_view
from coordinator.control.paging import Page
from coordinator.control.submission import Submissions
from coordinator.control.turns import Turns
from coordinator.control.visibility import check_job, subjects_hidden
from coordinator.control.watching import watch
from phalanx.errors import (
    Aborted,
    FailedPrecondition,
    InvalidArgument,
    PhalanxError,
    Violation,
)
from phalanx.ids import check_namespace
from phalanx.keys.caller import current_caller
from phalanx.rpc.types import ServicerContext
from phalanx.tasks import runs_tasks
from phalanx.v1 import dataset_service_pb2, job_pb2
from phalanx.v1 import job_service_pb2 as pb
from phalanx.v1 import job_service_pb2_grpc as pb_grpc
from phalanx.v1.control_journal_pb2 import JobSnapshot, JobSubmitted, RememberedRequest
from phalanx.v1.coordination_service_pb2 import JobLogLine

if TYPE_CHECKING:
    from coordinator.control.leader import Leader
    from coordinator.control.process import ControlProcess

FOLLOW_POLL_S = 5.0
LINES_COME_LATE_S = 2.0
"""So long after the end of a job its last lines may still be on their way: workers collect them for
a quarter of a second, and control writes them several times a second."""
MAX_POINTS = 10_000

ResponseT = TypeVar("ResponseT", bound=Message)


class JobServicer(pb_grpc.JobServiceServicer):
    """Checks requests, hands them to the leadership, shows what is durable."""

    def __init__(self, process: ControlProcess, submissions: Submissions) -> None:
        self._process = process
        self._submissions = submissions
        self._turns = Turns()

    async def SubmitJob(
        self, request: pb.SubmitJobRequest, context: ServicerContext
    ) -> pb.SubmitJobResponse:
        """Check, resolve and queue a job; with `validate_only` nothing is kept."""
        leader = self._process.leading()
        if not request.HasField("spec"):
            message = "is missing; send the job as the field spec"
            raise InvalidArgument(f"spec {message}", violations=[Violation("spec", message)])
        remembered = remember("SubmitJob", request)
        if not request.validate_only:
            with subjects_hidden(leader.core.facts):
                before = await leader.answered_before(remembered)
            if isinstance(before, pb.SubmitJobResponse):
                return before
        leader.check_storage()
        namespace = request.spec.namespace or "default"
        async with self._turns.of(namespace):
            if not request.validate_only:
                # Asked before the work too: what is refused anyhow shall cost nothing.
                leader.look_at_quotas()
                check_jobs(leader.core.config.quotas, leader.core.facts, namespace)
            return await self._submit(request, remembered, _submitter(context))

    async def _submit(
        self, request: pb.SubmitJobRequest, remembered: RememberedRequest, submitter: str
    ) -> pb.SubmitJobResponse:
        leader = self._process.leading()
        submitted, dataset = await self._submissions.prepare(request.spec, leader.core, submitter)
        if request.validate_only:
            view = job_view(JobFacts(JobSnapshot(submitted=submitted)), None)
            view.id = ""
            view.ClearField("create_time")
            view.state = job_pb2.Job.STATE_UNSPECIFIED
            return pb.SubmitJobResponse(job=view, plan=submitted.announced_plan)
        self._submissions.under_way.add(submitted.job_id)
        try:
            await self._store(leader, submitted, dataset)
            with subjects_hidden(leader.core.facts):
                answer = await leader.request(
                    lambda token: ev.SubmitJob(token, submitted, remembered)
                )
        finally:
            self._submissions.under_way.discard(submitted.job_id)
            # Refused, given up, or the second of two calls with one request id.
            if submitted.job_id not in leader.core.facts.jobs:
                # What cannot be let go now is let go later; the answer matters more.
                with contextlib.suppress(PhalanxError):
                    await self._submissions.discard(submitted.job_id)
        return _of_type(answer, pb.SubmitJobResponse)

    async def _store(
        self, leader: Leader, submitted: JobSubmitted, dataset: dataset_service_pb2.Dataset | None
    ) -> None:
        try:
            await self._submissions.store(submitted, dataset)
        except Aborted as error:
            raise leader.superseded(error) from error

    async def GetJob(
        self, request: pb.GetJobRequest, context: ServicerContext
    ) -> pb.GetJobResponse:
        """Return one job."""
        return pb.GetJobResponse(job=self._leader_for(request).job_view(request.job_id))

    async def ListJobs(
        self, request: pb.ListJobsRequest, context: ServicerContext
    ) -> pb.ListJobsResponse:
        """List jobs, newest first."""
        leader = self._process.leading()
        incomplete = leader.incomplete()
        if request.namespace:
            check_namespace(request.namespace)
        page = Page(request.page_size, request.page_token)
        chosen = [
            facts
            for facts in leader.durable.jobs.values()
            if (not request.namespace or facts.spec.namespace == request.namespace)
            and current_caller().may_act_in(facts.spec.namespace)
            and (not request.states or facts.state in request.states)
            and all(facts.spec.labels.get(key) == request.labels[key] for key in request.labels)
        ]
        taken, following = page.take(
            chosen, lambda facts: (-facts.kept.submit_unix_nanos, facts.job_id)
        )
        jobs = [leader.job_view(facts.job_id) for facts in taken]
        return pb.ListJobsResponse(jobs=jobs, next_page_token=following, incomplete=incomplete)

    async def CancelJob(
        self, request: pb.CancelJobRequest, context: ServicerContext
    ) -> pb.CancelJobResponse:
        """End a job."""
        answer = await self._call(
            "CancelJob",
            request,
            lambda token, remembered: ev.CancelJob(
                token, request.job_id, remembered, request.reason[:1000]
            ),
        )
        return _of_type(answer, pb.CancelJobResponse)

    async def PauseJob(
        self, request: pb.PauseJobRequest, context: ServicerContext
    ) -> pb.PauseJobResponse:
        """Pause a job at its next step boundary."""
        answer = await self._call(
            "PauseJob",
            request,
            lambda token, remembered: ev.PauseJob(token, request.job_id, remembered),
        )
        return _of_type(answer, pb.PauseJobResponse)

    async def ResumeJob(
        self, request: pb.ResumeJobRequest, context: ServicerContext
    ) -> pb.ResumeJobResponse:
        """Let a paused job go on."""
        answer = await self._call(
            "ResumeJob",
            request,
            lambda token, remembered: ev.ResumeJob(token, request.job_id, remembered),
        )
        return _of_type(answer, pb.ResumeJobResponse)

    async def RetryJob(
        self, request: pb.RetryJobRequest, context: ServicerContext
    ) -> pb.RetryJobResponse:
        """Try a failed job again from its last checkpoint."""
        answer = await self._call(
            "RetryJob",
            request,
            lambda token, remembered: ev.RetryJob(token, request.job_id, remembered),
        )
        return _of_type(answer, pb.RetryJobResponse)

    async def DeleteJob(
        self, request: pb.DeleteJobRequest, context: ServicerContext
    ) -> pb.DeleteJobResponse:
        """Forget an ended job."""
        leader = self._process.leading()
        answer = await self._call(
            "DeleteJob",
            request,
            lambda token, remembered: ev.DeleteJob(token, request.job_id, remembered),
        )
        await leader.removed(request.job_id)
        return _of_type(answer, pb.DeleteJobResponse)

    async def WatchJob(
        self, request: pb.WatchJobRequest, context: ServicerContext
    ) -> AsyncIterator[pb.WatchJobResponse]:
        """Show a job until it has ended."""
        if request.after_sequence < 0:
            raise _negative("after_sequence")
        leader = self._leader_for(request)
        async for update in watch(leader, request.job_id, request.after_sequence):
            yield update

    async def ReadJobLogs(
        self, request: pb.ReadJobLogsRequest, context: ServicerContext
    ) -> AsyncIterator[pb.ReadJobLogsResponse]:
        """Show the log of a job; with `follow` until it has ended and its last lines are here."""
        leader = self._leader_for(request)
        leader.job_view(request.job_id)
        after_nanos = _after_nanos(request)
        wake, position, enough_s = asyncio.Event(), 0, math.inf
        leader.streams.subscribe(request.job_id, wake)
        try:
            while True:
                leader.watchers.check_open()
                enough_s = _enough_s(leader.job_view(request.job_id), enough_s)
                complete = time.monotonic() >= enough_s
                wake.clear()
                async for following, line in leader.streams.lines(request.job_id, position):
                    position = following
                    chosen = not request.worker_id or line.worker_id == request.worker_id
                    if chosen and line.time_unix_nanos > after_nanos:
                        yield _log_response(line)
                if complete or not request.follow:
                    return
                wait_s = min(FOLLOW_POLL_S, max(0.0, enough_s - time.monotonic()))
                try:
                    await asyncio.wait_for(wake.wait(), wait_s)
                except TimeoutError:
                    continue
        finally:
            leader.streams.unsubscribe(request.job_id, wake)

    async def ReadTaskResults(
        self, request: pb.ReadTaskResultsRequest, context: ServicerContext
    ) -> AsyncIterator[pb.ReadTaskResultsResponse]:
        """Return what came of the tasks of a job so far."""
        leader = self._leader_for(request)
        job = leader.job_view(request.job_id)
        if not runs_tasks(job.spec):
            text = f"job {request.job_id} is no set of tasks and has no results of tasks"
            raise FailedPrecondition(text, reason="NO_TASKS")
        async for results in leader.task_results(request.job_id, frozenset(request.tasks)):
            yield pb.ReadTaskResultsResponse(results=results)

    async def ListJobMetrics(
        self, request: pb.ListJobMetricsRequest, context: ServicerContext
    ) -> pb.ListJobMetricsResponse:
        """Return the points of a job's metrics."""
        leader = self._leader_for(request)
        leader.job_view(request.job_id)
        if request.max_points < 0:
            raise _negative("max_points")
        incomplete = leader.incomplete()
        points = await leader.streams.points(
            request.job_id,
            request.names,
            request.after_step or -1,
            min(request.max_points or MAX_POINTS, MAX_POINTS),
        )
        return pb.ListJobMetricsResponse(points=points, incomplete=incomplete)

    def _leader_for(self, request: Any) -> Leader:
        """Return the leadership, for a caller who may know of the job that a request names."""
        leader = self._process.leading()
        check_job(leader.core.facts, request.job_id)
        return leader

    async def _call(
        self,
        method: str,
        request: Any,
        make: Callable[[int, RememberedRequest], ev.Event],
    ) -> Message:
        leader = self._leader_for(request)
        remembered = remember(method, request)
        with subjects_hidden(leader.core.facts):
            return await leader.request(lambda token: make(token, remembered))


def remember(method: str, request: Message) -> RememberedRequest:
    """Return what is remembered of a mutating call: its id and the hash of the rest of it."""
    bare = type(request)()
    bare.CopyFrom(request)
    request_id = checked_request_id(getattr(request, "request_id", ""))
    bare.ClearField("request_id")
    digest = hashlib.sha256(bare.SerializeToString(deterministic=True)).hexdigest()
    return RememberedRequest(request_id=request_id, method=method, digest=digest)


def _of_type(answer: Message, kind: type[ResponseT]) -> ResponseT:
    assert isinstance(answer, kind), f"{type(answer).__name__} instead of {kind.__name__}"
    return answer


def _after_nanos(request: pb.ReadJobLogsRequest) -> int:
    if not request.HasField("after_time"):
        return 0
    try:
        return request.after_time.ToNanoseconds()
    except ValueError as error:
        message = f"is no time: {error}"
        raise InvalidArgument(
            f"after_time {message}", violations=[Violation("after_time", message)]
        ) from None


def _negative(field: str) -> InvalidArgument:
    message = "must not be negative"
    return InvalidArgument(f"{field} {message}", violations=[Violation(field, message)])


def _submitter(context: ServicerContext) -> str:
    """Who submits a job; where nobody has a name, from which host."""
    caller = current_caller()
    if not caller.open_cluster:
        return caller.name
    kind, _, rest = context.peer().partition(":")
    return rest.rpartition(":")[0].strip("[]") if kind in ("ipv4", "ipv6") else kind


def _enough_s(job: job_pb2.Job, known_s: float) -> float:
    """When, on the monotonic clock, all lines of a job are here; `known_s` is what was said before.

    One that has been over for long has them already; how long it has been is told by the wall
    clock, which may have been set back.
    """
    if job.state not in ENDED:
        return math.inf
    ago_s = max(0.0, time.time() - job.end_time.ToNanoseconds() / 1e9)
    return min(known_s, time.monotonic() + max(0.0, LINES_COME_LATE_S - ago_s))


def _log_response(line: JobLogLine) -> pb.ReadJobLogsResponse:
    response = pb.ReadJobLogsResponse(worker_id=line.worker_id, level=line.level, text=line.text)
    response.time.FromNanoseconds(line.time_unix_nanos)
    if line.HasField("shard"):
        response.shard = line.shard
    if line.HasField("step"):
        response.step = line.step
    return response
