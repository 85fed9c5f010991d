"""Who sees and does what in a cluster that several namespaces share, on any control process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from phalanx.errors import NotFound, PermissionDenied, PhalanxError, Unauthenticated
from phalanx.keys.caller import CODE, Role, Service
from phalanx.rpc.status import from_rpc_error
from phalanx.testing.members import ScriptedAggregator, ScriptedWorker
from phalanx.v1 import (
    cluster_service_pb2,
    job_service_pb2,
    job_service_pb2_grpc,
)
from tests.integration.control.shared_cluster import GUARD_S, SharedCluster, submission


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[SharedCluster]:
    shared = SharedCluster(tmp_path)
    async with shared.stack:
        yield shared


async def _error(call: Any) -> PhalanxError:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call
    return from_rpc_error(refused.value)


async def _all(call: Any) -> list[Any]:
    return [each async for each in call]


async def test_jobs_of_other_namespaces_are_neither_seen_nor_touched(
    cluster: SharedCluster,
) -> None:
    await cluster.start()
    ring = cluster.ring
    ann, bob = (
        cluster.jobs(ring.token(name, namespaces=[space], permissions=[CODE]))
        for name, space in (("ann", "vision"), ("bob", "speech"))
    )
    job = (await ann.SubmitJob(submission("vision"), timeout=GUARD_S)).job
    assert job.submitter == "ann"
    refused = await _error(bob.SubmitJob(submission("vision"), timeout=GUARD_S))
    assert refused.reason == "NAMESPACE_NOT_ALLOWED"
    for method in ("GetJob", "CancelJob", "PauseJob", "ResumeJob", "RetryJob", "DeleteJob"):
        request = getattr(job_service_pb2, f"{method}Request")(job_id=job.id)
        there = await _error(getattr(bob, method)(request, timeout=GUARD_S))
        unknown = getattr(job_service_pb2, f"{method}Request")(job_id="count-bbbbbbbb")
        nowhere = await _error(getattr(bob, method)(unknown, timeout=GUARD_S))
        # What is somebody else's looks as what is not there.
        assert isinstance(there, NotFound), method
        assert str(there).replace(job.id, "count-bbbbbbbb") == str(nowhere)
    request = job_service_pb2.ListJobMetricsRequest(job_id=job.id)
    assert isinstance(await _error(bob.ListJobMetrics(request, timeout=GUARD_S)), NotFound)
    for method in ("WatchJob", "ReadJobLogs", "ReadTaskResults"):
        request = getattr(job_service_pb2, f"{method}Request")(job_id=job.id)
        call = getattr(bob, method)(request, timeout=GUARD_S)
        assert isinstance(await _error(_all(call)), NotFound), method
    listing = job_service_pb2.ListJobsRequest()
    assert not (await bob.ListJobs(listing, timeout=GUARD_S)).jobs
    assert len((await ann.ListJobs(listing, timeout=GUARD_S)).jobs) == 1
    named = job_service_pb2.ListJobsRequest(namespace="vision")
    assert isinstance(await _error(bob.ListJobs(named, timeout=GUARD_S)), PermissionDenied)


async def test_a_request_id_of_somebody_else_does_not_tell_of_the_job(
    cluster: SharedCluster,
) -> None:
    await cluster.start()
    ring = cluster.ring
    ann, bob = (
        cluster.jobs(ring.token(name, namespaces=[space], permissions=[CODE]))
        for name, space in (("ann", "vision"), ("bob", "speech"))
    )
    first = submission("vision", request_id="nightly")
    job = (await ann.SubmitJob(first, timeout=GUARD_S)).job
    own = (await bob.SubmitJob(submission("speech"), timeout=GUARD_S)).job
    cancel = job_service_pb2.CancelJobRequest(job_id=own.id, request_id="nightly")
    for call in (
        bob.SubmitJob(submission("speech", request_id="nightly"), timeout=GUARD_S),
        bob.CancelJob(cancel, timeout=GUARD_S),
    ):
        refused = await _error(call)
        assert refused.reason == "REQUEST_ID_REUSED"
        assert job.id not in f"{refused} {refused.details}"
    again = submission("vision", "other", request_id="nightly")
    refused = await _error(ann.SubmitJob(again, timeout=GUARD_S))
    assert refused.details["subject"] == job.id


async def test_events_and_views_of_workers_tell_nothing_of_other_namespaces(
    cluster: SharedCluster,
) -> None:
    await cluster.start()
    ring = cluster.ring
    ann, bob = (
        ring.token(name, namespaces=[space], permissions=[CODE])
        for name, space in (("ann", "vision"), ("bob", "speech"))
    )
    address, keys = cluster.members("worker")
    worker = ScriptedWorker(address, "worker-1")
    worker.keys = keys
    aggregator = ScriptedAggregator(address, "aggregator-1")
    aggregator.keys = cluster.members("aggregator")[1]
    async with worker, aggregator:
        job = (await cluster.jobs(ann).SubmitJob(submission("vision"), timeout=GUARD_S)).job
        await worker.wait_for("assign_job")
        everything = cluster_service_pb2.ListEventsRequest()
        for token, sees in ((ann, True), (bob, False)):
            operators = cluster.operators(token)
            found = await _all(operators.ListEvents(everything, timeout=GUARD_S))
            assert any(each.event.type == "WORKER_JOINED" for each in found)
            assert (job.id in str(found)) == sees
            view = await operators.GetCluster(
                cluster_service_pb2.GetClusterRequest(), timeout=GUARD_S
            )
            assert (job.id in str(view)) == sees
            workers = await operators.ListWorkers(
                cluster_service_pb2.ListWorkersRequest(), timeout=GUARD_S
            )
            assert (job.id in str(workers)) == sees
            assert len(workers.workers) == 1


async def test_a_follower_hands_on_who_calls_and_the_leader_looks_again(
    cluster: SharedCluster,
) -> None:
    await cluster.start(controls=2)
    ring = cluster.ring
    token = ring.token("ann", namespaces=["vision"], permissions=[CODE])
    viewer = ring.token("vic", Role.VIEWER)
    leads = [control._leader is not None for control in cluster.controls]
    assert sorted(leads) == [False, True]
    follower, leader = leads.index(False), leads.index(True)
    async with asyncio.timeout(GUARD_S):
        while True:
            try:
                answer = await cluster.jobs(token, control=follower).SubmitJob(
                    submission("vision", request_id="once"), timeout=GUARD_S
                )
            except grpc.aio.AioRpcError as error:
                if from_rpc_error(error).reason != "NOT_LEADER":
                    raise
                await asyncio.sleep(0.05)
            else:
                break
    assert answer.job.submitter == "ann"
    get = job_service_pb2.GetJobRequest(job_id=answer.job.id)
    for control in (follower, leader):
        jobs = cluster.jobs(viewer, control=control)
        assert (await jobs.GetJob(get, timeout=GUARD_S)).job.submitter == "ann"
        wanted = submission("vision")
        assert isinstance(await _error(jobs.SubmitJob(wanted, timeout=GUARD_S)), PermissionDenied)
        again = await cluster.jobs(token, control=control).SubmitJob(
            submission("vision", request_id="once"), timeout=GUARD_S
        )
        assert again.job.id == answer.job.id
    # The mark of a call that was handed on gives nobody a name, not even a control process.
    for certificate, expected in (("control", PermissionDenied), ("client", Unauthenticated)):
        channel = cluster.channel(certificate=certificate, control=leader)
        jobs = job_service_pb2_grpc.JobServiceStub(channel)
        metadata = (("phalanx-forwarded", "1"),)
        call = jobs.GetJob(get, timeout=GUARD_S, metadata=metadata)
        assert isinstance(await _error(call), expected)


async def test_members_are_who_their_certificates_say(cluster: SharedCluster) -> None:
    await cluster.start()
    ring = cluster.ring
    for name in ("w-7", "w-8"):
        ring.write(name, ring.authority.issue_node([Service.WORKER], member_id=name))

    async def refused(member: Any, certificate: str) -> PhalanxError:
        member.keys = ring.client(certificate)
        with pytest.raises(PermissionDenied) as denied:
            await member.__aenter__()
        await member.kill()
        return denied.value

    address, _ = cluster.members("worker")
    w7 = ScriptedWorker(address, "w-7")
    w7.keys = ring.client("w-7")
    async with w7:
        # Neither by a name of its own, nor by that of the pool.
        assert (await refused(ScriptedWorker(address, "w-7"), "w-8")).reason == "NOT_THIS_MEMBER"
        assert (await refused(ScriptedWorker(address, "w-7"), "worker")).reason == "NOT_THIS_MEMBER"
        assert (await refused(ScriptedWorker(address, "w-1"), "w-8")).reason == "NOT_THIS_MEMBER"
        kind = await refused(ScriptedWorker(address, "w-1"), "aggregator")
        assert kind.reason == "ROLE_NOT_ALLOWED"
        kind = await refused(ScriptedAggregator(address, "a-1"), "worker")
        assert kind.reason == "ROLE_NOT_ALLOWED"
        # Autoscaled workers share a certificate: any new id is theirs, and so is coming back.
        for _ in range(2):
            pooled = ScriptedWorker(address, "w-9")
            pooled.keys = ring.client("worker")
            async with pooled:
                assert w7.error is None


async def test_quotas_are_those_of_the_namespace_that_the_caller_is_in(
    cluster: SharedCluster,
) -> None:
    await cluster.start(namespace_jobs_max=1)
    ring = cluster.ring
    ann = cluster.jobs(ring.token("ann", namespaces=["vision"], permissions=[CODE]))
    bob = cluster.jobs(ring.token("bob", namespaces=["speech"], permissions=[CODE]))
    await ann.SubmitJob(submission("vision"), timeout=GUARD_S)
    refused = await _error(ann.SubmitJob(submission("vision", "two"), timeout=GUARD_S))
    assert refused.reason == "QUOTA_EXCEEDED"
    # It cannot be had from others by naming their namespace.
    refused = await _error(ann.SubmitJob(submission("speech", "two"), timeout=GUARD_S))
    assert refused.reason == "NAMESPACE_NOT_ALLOWED"
    await bob.SubmitJob(submission("speech"), timeout=GUARD_S)


async def test_submissions_need_the_permission_to_bring_code(cluster: SharedCluster) -> None:
    await cluster.start()
    without = cluster.jobs(cluster.ring.token("ann", namespaces=["vision"]))
    refused = await _error(without.SubmitJob(submission("vision"), timeout=GUARD_S))
    assert refused.reason == "CODE_NOT_ALLOWED"
    assert [each.field for each in refused.violations] == ["spec.code"]
    assert json.dumps(str(refused)).count("ann") == 1
