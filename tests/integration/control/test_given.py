"""What nodes with certificates of their own may do to what other nodes were given."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from coordinator.aggregation.config import AggregatorConfig
from coordinator.aggregation.process import Aggregator
from coordinator.aggregation.task_servicer import SERVICE, TaskServicer
from phalanx.clients.storage import StorageClient
from phalanx.errors import PermissionDenied, PhalanxError
from phalanx.keys.caller import CODE, Service
from phalanx.rpc.channel import open_channel
from phalanx.rpc.credentials import ServerKeys
from phalanx.rpc.server import Server
from phalanx.rpc.status import from_rpc_error
from phalanx.telemetry.metrics import AggregatorMetrics
from phalanx.testing.members import ScriptedAggregator, ScriptedWorker
from phalanx.testing.storage_messages import part
from phalanx.v1 import coordination_service_pb2 as pb
from phalanx.v1 import job_service_pb2, task_service_pb2, task_service_pb2_grpc
from phalanx.v1 import storage_service_pb2 as storage_pb
from phalanx.v1.job_pb2 import MetricPoint
from tests.integration.control.shared_cluster import GUARD_S, SharedCluster, submission
from worker.session.streams import end_of

WORKERS, AGGREGATORS = ("w-1", "w-2"), ("a-1", "a-2")


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[SharedCluster]:
    shared = SharedCluster(tmp_path)
    async with shared.stack:
        await shared.start()
        ring = shared.ring
        for names, service in ((WORKERS, Service.WORKER), (AGGREGATORS, Service.AGGREGATOR)):
            for name in names:
                ring.write(name, ring.authority.issue_node([service], member_id=name))
        yield shared


class Labelled(ScriptedWorker):
    """A worker of the pool that its id begins with."""

    def hello(self) -> pb.SessionRequest:
        request = super().hello()
        request.worker_hello.labels["only"] = self.member_id
        return request


async def member(cluster: SharedCluster, made: Any) -> Any:
    made.keys = cluster.ring.client(made.member_id)
    return await cluster.stack.enter_async_context(made)


async def started(cluster: SharedCluster) -> tuple[Any, dict[str, Any], Any]:
    """A job that w-1 and a-1 were given; w-2 and a-2 are there, too."""
    address, _ = cluster.members("worker")
    members = {"a-1": await member(cluster, ScriptedAggregator(address, "a-1"))}
    for name in WORKERS:
        members[name] = await member(cluster, Labelled(address, name))
    jobs = cluster.jobs(cluster.ring.token("ann", namespaces=["vision"], permissions=[CODE]))
    request = submission("vision")
    request.spec.resources.worker_labels["only"] = "w-1"
    job = (await jobs.SubmitJob(request, timeout=GUARD_S)).job
    await members["w-1"].wait_for("assign_job")
    await members["a-1"].wait_for("assign_ranges")
    members["a-2"] = await member(cluster, ScriptedAggregator(address, "a-2"))
    return job, members, jobs


def storage(cluster: SharedCluster, certificate: str) -> StorageClient:
    client = StorageClient(cluster.storage_address, keys=cluster.ring.client(certificate))
    cluster.stack.push_async_callback(client.close)
    return client


async def refused(call: Any, *fields: str) -> None:
    with pytest.raises(PermissionDenied) as denied:
        await call
    assert denied.value.reason == "NOT_YOURS"
    assert [each.field for each in denied.value.violations] == list(fields)


async def test_checkpoints_come_from_the_owner_of_the_range(cluster: SharedCluster) -> None:
    job, members, _ = await started(cluster)
    term = (await members["a-1"].wait_for("assign_ranges")).term
    own = storage(cluster, "a-1")
    await own.put_blob(b"what was summed")
    request = part(b"what was summed", job_id=job.id, term=term, step=1)
    for foreign in ("a-2", "w-1", "w-2", "worker"):
        await refused(storage(cluster, foreign).commit_checkpoint(request), "part.range")
    assert (await own.commit_checkpoint(request)).complete


async def test_results_of_tasks_come_from_the_owner(cluster: SharedCluster) -> None:
    job, _, _ = await started(cluster)
    own, foreign = storage(cluster, "a-1"), storage(cluster, "a-2")
    digest = await own.put_blob(b"a large result")
    pin = [storage_pb.Pin(blob=digest)]
    stream = f"tasks/{job.id}"
    for client, may in ((foreign, False), (own, True)):
        append = client.journal_appender()
        calls = (
            (append.append(stream, [b"\x08\x01"], 0), "stream"),
            (client.set_pins(f"{job.id}/1", pin), "holder"),
            (_read(client, stream), "stream"),
        )
        for call, field in calls:
            if may:
                await call
            else:
                await refused(call, field)
        append.close()


async def _read(client: StorageClient, stream: str) -> None:
    assert [each.payload async for each in client.read_journal(stream)] == [b"\x08\x01"]


async def test_members_are_heard_of_their_own_jobs(cluster: SharedCluster) -> None:
    job, members, jobs = await started(cluster)
    for name in ("w-2", "a-2", "w-1", "a-1"):
        line = pb.JobLogLine(time_unix_nanos=1, text=f"said by {name}")
        point = MetricPoint(step=1, name=name[0] + name[2], value=1.0)
        members[name].say(job_log_lines=pb.JobLogLines(job_id=job.id, lines=[line]))
        members[name].say(metric_points=pb.MetricPoints(job_id=job.id, points=[point]))
        event = pb.MemberEvent(type="STORAGE_UNAVAILABLE", job_id=job.id, message=f"by {name}")
        members[name].say(member_event=event)
        failed = pb.LeafFailed(job_id=job.id, term=1, shard=-1, message=f"by {name}")
        members[name].say(leaf_failed=failed)
        # What was said before is taken in by the time that it is answered.
        beats = len(members[name].received)
        async with asyncio.timeout(GUARD_S):
            while not _answered(members[name].received[beats + 1 :]):
                await asyncio.sleep(0.01)
        assert members[name].error is None, "the session goes on"
    texts = []
    async with asyncio.timeout(GUARD_S):
        while len(texts) < 2:
            request = job_service_pb2.ReadJobLogsRequest(job_id=job.id)
            texts = [each.text async for each in jobs.ReadJobLogs(request, timeout=GUARD_S)]
            await asyncio.sleep(0.05)
    assert sorted(texts) == ["said by a-1", "said by w-1"]
    points: set[str] = set()
    async with asyncio.timeout(GUARD_S):
        while not points:
            listing = job_service_pb2.ListJobMetricsRequest(job_id=job.id)
            answer = await jobs.ListJobMetrics(listing, timeout=GUARD_S)
            points = {each.name for each in answer.points}
            await asyncio.sleep(0.05)
    assert points == {"a1"}


async def test_whoever_is_not_heard_cannot_fill_the_log(
    cluster: SharedCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    job, members, _ = await started(cluster)
    for number in range(50):
        ids = [job.id, f"job-{number}"]
        for job_id in ids:
            members["w-2"].say(leaf_failed=pb.LeafFailed(job_id=job_id, term=1, shard=-1))
            members["w-2"].say(job_log_lines=pb.JobLogLines(job_id=job_id))
    beats = len(members["w-2"].received)
    async with asyncio.timeout(GUARD_S):
        while not _answered(members["w-2"].received[beats + 1 :]):
            await asyncio.sleep(0.01)
    told = [line for line in capsys.readouterr().out.splitlines() if "member_not_heard" in line]
    fields = ("leaf_failed.job_id", "job_log_lines.job_id")
    assert [[field in line for field in fields] for line in told] == [[True, False], [False, True]]
    assert all(job.id in line for line in told)


def _answered(messages: list[pb.SessionResponse]) -> bool:
    return any(each.WhichOneof("message") == "heartbeat_answer" for each in messages)


async def test_a_worker_shows_what_it_was_given_when_it_comes_back(
    cluster: SharedCluster,
) -> None:
    job, members, _ = await started(cluster)
    address, _ = cluster.members("worker")
    assign = await members["w-1"].wait_for("assign_job")
    held = members["w-1"].holding()
    assert assign.given.seal
    # w-2 has seen none of it, and claims it nevertheless.
    await members["w-2"].kill()
    thief = await member(cluster, Labelled(address, "w-2", held=held))
    assert (await thief.wait_for("revoke_job")).job_id == job.id
    await members["w-1"].kill()
    unproven = pb.HeldWorkerJob()
    unproven.CopyFrom(held[0])
    unproven.ClearField("given")
    again = Labelled(address, "w-1", held=(unproven,))
    again.incarnation = members["w-1"].incarnation
    again = await member(cluster, again)
    assert (await again.wait_for("revoke_job")).job_id == job.id
    await again.kill()
    whole = Labelled(address, "w-1", held=held)
    whole.incarnation = members["w-1"].incarnation
    whole = await member(cluster, whole)
    await whole.wait_for("heartbeat_answer")
    assert not any(each.WhichOneof("message") == "revoke_job" for each in whole.received)


@contextlib.asynccontextmanager
async def owner_of_tasks(cluster: SharedCluster) -> AsyncIterator[None]:
    """A real aggregator with a certificate of its own."""
    config = AggregatorConfig(
        id="a-1",
        listen="127.0.0.1:0",
        metrics_listen=None,
        control=(cluster.controls[0].server.address,),
        storage=(cluster.storage_address,),
        **cluster.ring.flags("a-1"),
    )
    server = Server(
        listen=config.listen,
        metrics_listen=None,
        service_names=[SERVICE],
        keys=ServerKeys.of(config),
    )
    aggregator = Aggregator(config, AggregatorMetrics(server.registry), "test")
    servicer = TaskServicer(aggregator.find_tasks)
    task_service_pb2_grpc.add_TaskServiceServicer_to_server(servicer, server.raw)
    await server.start()
    aggregator.start(server.address)
    try:
        yield
    finally:
        await aggregator.close()
        await server.stop(0)


async def test_streams_to_owners_are_for_those_who_were_given_the_job(
    cluster: SharedCluster,
) -> None:
    async with owner_of_tasks(cluster):
        address, _ = cluster.members("worker")
        workers = {name: await member(cluster, Labelled(address, name)) for name in WORKERS}
        jobs = cluster.jobs(cluster.ring.token("ann", namespaces=["vision"], permissions=[CODE]))
        request = submission("vision")
        request.spec.resources.worker_labels["only"] = "w-1"
        await jobs.SubmitJob(request, timeout=GUARD_S)
        assign = await workers["w-1"].wait_for("assign_job")
        hello = task_service_pb2.WorkHello(
            job_id=assign.plan.job_id, term=assign.term, worker_id="w-1", slots=1
        )
        hello.given.CopyFrom(assign.given)
        owner = assign.ranges[0].address
        for certificate, changes, field in (
            ("w-2", {}, "hello.worker_id"),
            ("w-2", {"worker_id": "w-2"}, "hello.given"),
            ("w-1", {"given": None}, "hello.given"),
            # Of what is no member's own certificate the proof is asked for as well.
            ("worker", {"worker_id": "w-3"}, "hello.given"),
        ):
            foreign = task_service_pb2.WorkHello()
            foreign.CopyFrom(hello)
            for name, value in changes.items():
                foreign.ClearField(name)
                if value is not None:
                    setattr(foreign, name, value)
            with pytest.raises(PermissionDenied) as refused:
                await _welcomed(cluster, owner, certificate, foreign)
            assert [each.field for each in refused.value.violations] == [field]
        assert await _welcomed(cluster, owner, "w-1", hello) == assign.term


async def _welcomed(cluster: SharedCluster, address: str, certificate: str, hello: Any) -> int:
    """The term of the welcome to a stream of tasks."""
    keys = cluster.ring.client(certificate)
    channel = open_channel(address, keys=keys, service=Service.AGGREGATOR, own_connection=True)
    try:
        while True:
            call = task_service_pb2_grpc.TaskServiceStub(channel).Work(timeout=GUARD_S)
            try:
                await call.write(task_service_pb2.WorkRequest(hello=hello))
                answer = await call.read()
                if answer is grpc.aio.EOF:
                    raise await end_of(call)
                return int(answer.welcome.term)
            except grpc.aio.AioRpcError as error:
                known = from_rpc_error(error)
            except PhalanxError as error:
                known = error
            if known.reason != "RANGES_NOT_READY":
                raise known
            await asyncio.sleep(0.02)
    finally:
        await channel.close()
