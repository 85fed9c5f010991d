"""Control when things go wrong: members die, control is killed, storage goes away, clients lie."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from coordinator.control.forwarding import FORWARDED
from coordinator.control.process import SERVICE_NAMES
from phalanx.errors import Unavailable
from phalanx.rpc.channel import open_channel
from phalanx.rpc.status import from_rpc_error
from phalanx.testing.members import ScriptedAggregator, ScriptedWorker
from phalanx.v1 import cluster_service_pb2, job_service_pb2
from phalanx.v1 import coordination_service_pb2 as pb
from phalanx.v1 import storage_service_pb2 as storage_pb
from phalanx.v1.job_pb2 import Job

GUARD_S = 30.0


def shards_of(assign: pb.AssignJob) -> set[int]:
    found: set[int] = set()
    for node in assign.train_nodes:
        found.update(range(node.first, min(node.first + node.span, assign.plan.shards)))
    return found


async def test_a_killed_worker_is_noticed_by_its_broken_stream(cluster: Any) -> None:
    async with (
        ScriptedAggregator(cluster.control_address, "a1") as aggregator,
        ScriptedWorker(cluster.control_address, "w1") as first,
    ):
        second = await ScriptedWorker(cluster.control_address, "w2").__aenter__()
        job = await cluster.submit()
        await first.wait_for("assign_job", lambda each: bool(each.train_nodes))
        await second.kill()
        await first.wait_for("assign_job", lambda each: shards_of(each) == set(range(8)))
        lost = await cluster.wait_for_event("WORKER_LOST")
        moved = await cluster.wait_for_event("SHARDS_MOVED", job.id)
        assert moved.incident_id == lost.incident_id
        aggregator.report(job.id, 5, since_commit_s=0.0)
        recovered = await cluster.wait_for_event("RECOVERED", job.id)
        assert recovered.incident_id == lost.incident_id


async def test_drain_through_the_api(cluster: Any) -> None:
    async with (
        ScriptedAggregator(cluster.control_address, "a1") as aggregator,
        ScriptedWorker(cluster.control_address, "w1") as first,
        ScriptedWorker(cluster.control_address, "w2") as second,
    ):
        job = await cluster.submit()
        await second.wait_for("assign_job", lambda each: bool(each.train_nodes))
        request = cluster_service_pb2.DrainWorkerRequest(worker_id="w2", request_id="d1")
        answer = await cluster.operators().DrainWorker(request, timeout=GUARD_S)
        assert answer.worker.state == cluster_service_pb2.Worker.STATE_DRAINING
        await first.wait_for("assign_job", lambda each: shards_of(each) == set(range(8)))
        # The one that took over has done a step of its own.
        aggregator.report(job.id, 5, since_commit_s=0.0)
        await second.wait_for("revoke_job")
        await second.wait_for("drain")
        missing = cluster_service_pb2.DrainWorkerRequest(worker_id="w9")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await cluster.operators().DrainWorker(missing, timeout=GUARD_S)
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND


async def test_a_killed_control_comes_back_and_adopts_what_runs(storage_only: Any) -> None:
    await storage_only.spawn_control()
    aggregator = ScriptedAggregator(storage_only.control_address, "a1")
    worker = ScriptedWorker(storage_only.control_address, "w1")
    async with aggregator, worker:
        job = await storage_only.submit("nightly-1")
        assigned = await worker.wait_for("assign_job", lambda each: bool(each.train_nodes))
        await storage_only.wait_for_state(job.id, "RUNNING")
        before = await storage_only.events()
        await storage_only.kill_control()
        assert (await worker.wait_for_end()).reason
    await storage_only.spawn_control()
    held = pb.HeldRanges(job_id=job.id, term=1, range_indexes=[0], version=7)
    again = ScriptedWorker(storage_only.control_address, "w1", held=worker.holding(), scripted=True)
    again.incarnation = worker.incarnation
    same = ScriptedAggregator(storage_only.control_address, "a1", held=(held,))
    same.incarnation = aggregator.incarnation
    async with same, again:
        async with ScriptedWorker(storage_only.control_address, "w2") as newcomer:
            grown = await newcomer.wait_for("assign_job", lambda each: bool(each.train_nodes))
            assert grown.term == 1
            assert grown.placement > assigned.placement
        adopted = await storage_only.job(job.id)
        assert adopted.state == Job.STATE_RUNNING
        assert (await storage_only.submit("nightly-1")).id == job.id
        after = await storage_only.events()
        assert after[: len(before)] == before
        assert [event.sequence for event in after] == list(range(1, len(after) + 1))
        assert "AGGREGATOR_LOST" not in [event.type for event in after]
        generations = {event.generation for event in after}
        assert generations == {1, 2}
        same.report(job.id, 8, since_commit_s=0.0)
        recovered = await storage_only.wait_for_event("RECOVERED", job.id)
        assert (recovered.details["cause"], recovered.details["member"]) == (
            "control_lost",
            "control",
        )
        story = [each for each in after if each.incident_id == recovered.incident_id]
        assert [each.type for each in story] == ["CONTROL_TOOK_OVER", "WORKER_JOINED"]
        same.report(job.id, 9)
        await storage_only.finish(same, job.id)
        await storage_only.wait_for_state(job.id, "SUCCEEDED")


async def test_a_job_that_ended_while_control_was_away_is_found_finished(
    storage_only: Any,
) -> None:
    await storage_only.spawn_control()
    async with (
        ScriptedAggregator(storage_only.control_address, "a1"),
        ScriptedWorker(storage_only.control_address, "w1"),
    ):
        job = await storage_only.submit()
        await storage_only.wait_for_state(job.id, "RUNNING")
        await storage_only.kill_control()
    await storage_only.commit(job.id, 40, final=True)
    await storage_only.spawn_control()
    ended = await storage_only.wait_for_state(job.id, "SUCCEEDED")
    assert ended.result.metrics["test/accuracy"] == 0.875
    # No report of the end was ever heard; the final manifest says the same.
    assert (ended.result.examples_lost, ended.result.steps, ended.progress.step) == (8, 40, 40)


async def test_an_aggregator_that_does_not_come_back_is_replaced(storage_only: Any) -> None:
    await storage_only.spawn_control()
    async with (
        ScriptedAggregator(storage_only.control_address, "a1"),
        ScriptedWorker(storage_only.control_address, "w1"),
    ):
        job = await storage_only.submit()
        await storage_only.wait_for_state(job.id, "RUNNING")
        await storage_only.commit(job.id, 12)
        await storage_only.kill_control()
    await storage_only.spawn_control()
    async with (
        ScriptedAggregator(storage_only.control_address, "a2") as other,
        ScriptedWorker(storage_only.control_address, "w1"),
    ):
        assigned = await other.wait_for("assign_ranges")
        assert (assigned.term, assigned.restore.step) == (2, 12)


async def test_a_follower_hands_calls_on_and_takes_over(storage_only: Any) -> None:
    await storage_only.spawn_control("first")
    job = await storage_only.submit("nightly-1")
    first = storage_only.control_address
    await storage_only.start_control("second", lease_ttl_s=3.0, heartbeat_interval_s=0.2)
    assert storage_only.control_address != first
    await storage_only.wait_until_it_answers()
    listed = await storage_only.jobs().ListJobs(job_service_pb2.ListJobsRequest(), timeout=GUARD_S)
    assert [each.id for each in listed.jobs] == [job.id]
    assert (await storage_only.submit("nightly-1")).id == job.id
    request = job_service_pb2.WatchJobRequest(job_id=job.id)
    watching = storage_only.jobs().WatchJob(request, timeout=GUARD_S)
    assert (await watching.read()).job.id == job.id
    missing = job_service_pb2.GetJobRequest(job_id="nobody-knows")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await storage_only.jobs().GetJob(missing, timeout=GUARD_S)
    assert from_rpc_error(caught.value).reason == "JOB_NOT_FOUND", "errors come as they are"
    storage_only.process.kill()  # the watching channel stays open
    await storage_only.process.wait()
    storage_only.process = None
    with pytest.raises(grpc.aio.AioRpcError) as broken:
        while await watching.read() is not grpc.aio.EOF:
            pass
    assert from_rpc_error(broken.value).reason == "NOT_LEADER", "it says to try again"
    await storage_only.wait_until_it_answers()
    assert (await storage_only.submit("nightly-1")).id == job.id
    answer = await storage_only.operators().GetCluster(
        cluster_service_pb2.GetClusterRequest(), timeout=GUARD_S
    )
    assert (answer.leader, answer.generation) == ("second", 2)


async def test_a_follower_is_well_and_says_that_it_does_not_lead(storage_only: Any) -> None:
    """What waits for a new process to be well, as a rolling update does, must not wait until it
    leads; and members look for the leader itself."""
    await storage_only.spawn_control("first")
    await storage_only.start_control("second", lease_ttl_s=3.0, heartbeat_interval_s=0.2)
    serving = health_pb2.HealthCheckResponse.SERVING
    async with open_channel(storage_only.control_address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)

        async def wait_for(service: str) -> None:
            watching = stub.Watch(health_pb2.HealthCheckRequest(service=service), timeout=GUARD_S)
            while (await watching.read()).status != serving:
                pass
            watching.cancel()

        async def serves(service: str) -> bool:
            request = health_pb2.HealthCheckRequest(service=service)
            return bool((await stub.Check(request, timeout=GUARD_S)).status == serving)

        job_service, cluster_service, coordination = SERVICE_NAMES
        await wait_for("")
        assert await serves(job_service)
        assert await serves(cluster_service)
        assert not await serves(coordination)
        await storage_only.kill_control()
        await wait_for(coordination)
        assert await serves("")
        assert await serves(job_service)


async def test_a_call_to_a_leader_that_stopped_ends_when_another_one_leads(
    storage_only: Any,
) -> None:
    """A stopped process keeps its sockets and never answers; the caller must not wait for it."""
    await storage_only.spawn_control("first")
    await storage_only.start_control("second", lease_ttl_s=3.0, heartbeat_interval_s=0.2)
    await storage_only.wait_until_it_answers()
    storage_only.process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await storage_only.jobs().ListJobs(job_service_pb2.ListJobsRequest(), timeout=GUARD_S)
        assert from_rpc_error(caught.value).reason == "NOT_LEADER"
        await storage_only.wait_until_it_answers()
    finally:
        storage_only.process.send_signal(signal.SIGCONT)


async def test_a_call_is_handed_on_once_at_most(storage_only: Any) -> None:
    """Two processes that take each other for the leader must not play ball with it."""
    await storage_only.spawn_control("first")
    await storage_only.start_control("second", lease_ttl_s=3.0, heartbeat_interval_s=0.2)
    await storage_only.wait_until_it_answers()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await storage_only.jobs().ListJobs(
            job_service_pb2.ListJobsRequest(), timeout=GUARD_S, metadata=[(FORWARDED, "1")]
        )
    error = from_rpc_error(caught.value)
    assert isinstance(error, Unavailable)
    assert (error.reason, error.retry_after_s) == ("NOT_LEADER", 0.2)


async def test_members_are_not_handed_on(storage_only: Any) -> None:
    """A session is with the leader itself: a follower in between would hide who died."""
    await storage_only.spawn_control("first")
    await storage_only.start_control("second", lease_ttl_s=3.0, heartbeat_interval_s=0.2)
    await storage_only.wait_until_it_answers()
    with pytest.raises(Unavailable) as refused:
        async with ScriptedWorker(storage_only.control_address, "w1"):
            pass
    assert refused.value.reason == "NOT_LEADER"


async def test_a_leader_whose_lease_was_taken_steps_down(storage_only: Any) -> None:
    """As after a long pause: another one leads, and what the old one decides is refused."""
    await storage_only.start_control("first", lease_ttl_s=4.0)
    first = storage_only.control
    assert first is not None
    store = storage_only.store()
    lease = (await store.GetLease(storage_pb.GetLeaseRequest(name="leader"), timeout=GUARD_S)).lease
    taken = await store.AcquireLease(
        storage_pb.AcquireLeaseRequest(
            name="leader",
            holder="other",
            seen_token=lease.token,
            seen_counter=lease.counter,
        ),
        timeout=GUARD_S,
    )
    while not taken.acquired:  # it was renewed in between
        seen = taken.lease
        taken = await store.AcquireLease(
            storage_pb.AcquireLeaseRequest(
                name="leader", holder="other", seen_token=seen.token, seen_counter=seen.counter
            ),
            timeout=GUARD_S,
        )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await storage_only.submit()
    assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED)
    async with asyncio.timeout(GUARD_S):
        while True:
            try:
                first.leading()
            except Unavailable:
                break
            await asyncio.sleep(0.01)
    release = storage_pb.ReleaseLeaseRequest(name="leader", holder="other", token=taken.lease.token)
    await store.ReleaseLease(release, timeout=GUARD_S)
    await storage_only.wait_until_it_answers()
    assert (await storage_only.submit()).id


async def test_storage_away_refuses_submissions_and_nothing_else(cluster: Any) -> None:
    address = cluster.storage_address
    async with (
        ScriptedAggregator(cluster.control_address, "a1"),
        ScriptedWorker(cluster.control_address, "w1") as first,
    ):
        second = await ScriptedWorker(cluster.control_address, "w2").__aenter__()
        job = await cluster.submit()
        await second.wait_for("assign_job", lambda each: bool(each.train_nodes))
        await cluster.wait_for_state(job.id, "RUNNING")
        await cluster.stop_storage()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await cluster.submit()
        error = from_rpc_error(caught.value)
        assert isinstance(error, Unavailable)
        assert error.retry_after_s
        await second.kill()
        await first.wait_for("assign_job", lambda each: shards_of(each) == set(range(8)))
        assert (await cluster.job(job.id)).state == Job.STATE_RUNNING
        cancel = job_service_pb2.CancelJobRequest(job_id=job.id, request_id="c1")
        with pytest.raises(grpc.aio.AioRpcError):
            await cluster.jobs().CancelJob(cancel, timeout=GUARD_S)
        await cluster.start_storage(listen=address)
        async with asyncio.timeout(GUARD_S):
            while True:
                try:
                    answer = await cluster.jobs().CancelJob(cancel, timeout=GUARD_S)
                    break
                except grpc.aio.AioRpcError:
                    await asyncio.sleep(0.05)
        assert answer.job.state == Job.STATE_CANCELLED
        restored = await cluster.wait_for_event("STORAGE_RESTORED")
        lost = await cluster.wait_for_event("STORAGE_UNAVAILABLE")
        assert lost.sequence < restored.sequence
        assert lost.incident_id == restored.incident_id != ""
        assert float(restored.details["restored_after_s"]) > 0


async def test_a_mute_session_is_closed(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from coordinator.control import sessions

    monkeypatch.setattr(sessions, "HELLO_TIMEOUT_S", 0.1)
    member = ScriptedWorker(cluster.control_address, "w1")
    member.hello = lambda: pb.SessionRequest(heartbeat=pb.Heartbeat())  # type: ignore[method-assign]
    with pytest.raises(Exception, match="hello"):
        await member.__aenter__()
    await member.kill()


async def test_the_snapshot_keeps_a_restart_short(storage_only: Any) -> None:
    await storage_only.start_control(snapshot_every_records=10)
    stub = storage_only.jobs()
    kept = [(await storage_only.submit(f"r{n}")).id for n in range(3)]
    for _ in range(12):
        job = await storage_only.submit()
        cancel = job_service_pb2.CancelJobRequest(job_id=job.id)
        await stub.CancelJob(cancel, timeout=GUARD_S)
        await stub.DeleteJob(job_service_pb2.DeleteJobRequest(job_id=job.id), timeout=GUARD_S)
    assert storage_only.control is not None
    store = storage_only.control.store
    async with asyncio.timeout(GUARD_S):
        while (await anext(store.read("control", 0))).sequence == 0:
            await asyncio.sleep(0.02)
    live = storage_only.control.leading().core.facts.digest()
    assert len([each async for each in store.read("control", 0)]) < 30
    await storage_only.stop_control()
    await storage_only.start_control(snapshot_every_records=10)
    assert storage_only.control.leading().core.facts.digest() == live
    assert (await storage_only.submit("r1")).id == kept[1]


def raw(address: str, method: str) -> Any:
    """A unary call that sends bytes as they are, as a foreign client may."""
    channel = open_channel(address)
    call = channel.unary_unary(
        f"/phalanx.v1.JobService/{method}",
        request_serializer=lambda data: data,
        response_deserializer=job_service_pb2.SubmitJobResponse.FromString,
    )
    return channel, call


async def test_whatever_arrives_in_bytes_is_checked(cluster: Any, make_spec: Any) -> None:
    base = make_spec().SerializeToString()
    # Two members of a choice: parameter_server (7), then all_reduce (8) inside of train (20). The
    # last wins on the wire; gpus (4) of resources (6), which the model has no use for, are named.
    both = base + b"\xa2\x01\x04" + b"\x3a\x00" + b"\x42\x00" + b"\x32\x02\x20\x01"
    # A field that this version does not know: number 900 of JobSpec.
    foreign = base + b"\xa2\x38\x01x"
    # `null` for program arrives as an empty message: train: {}.
    empty = b"\x0a\x01x" + b"\xa2\x01\x00"
    # `30m` cannot arrive; a duration with the wrong sign of nanos can: retain (11).
    duration = base + b"\x5a\x0d\x08\x01\x10" + b"\xff" * 9 + b"\x01"
    cases = {
        both: (grpc.StatusCode.INVALID_ARGUMENT, "resources.gpus"),
        foreign: (grpc.StatusCode.UNIMPLEMENTED, "900"),
        empty: (grpc.StatusCode.INVALID_ARGUMENT, "train.model"),
        duration: (grpc.StatusCode.INVALID_ARGUMENT, "retain"),
        b"\xff\xff\xff": (None, ""),
    }
    for spec_bytes, (code, named) in cases.items():
        length = len(spec_bytes)
        prefix = bytes([length]) if length < 128 else bytes([length & 0x7F | 0x80, length >> 7])
        channel, call = raw(cluster.control_address, "SubmitJob")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"\x0a" + prefix + spec_bytes, timeout=GUARD_S)
        await channel.close()
        if code is not None:
            assert caught.value.code() == code, caught.value.details()
            error = from_rpc_error(caught.value)
            assert named in error.message + " ".join(each.field for each in error.violations)
    assert (await cluster.submit()).id, "the cluster goes on"


async def test_buf_curl_submits_json_through_reflection(cluster: Any) -> None:
    buf = shutil.which("buf", path=str(Path(sys.executable).parent))
    assert buf is not None, "buf-bin is a development dependency"
    job = {
        "name": "from-buf",
        "data": {"name": "digits", "shards": 8},
        "train": {"model": {"logisticRegression": {}}, "batchSize": 512},
    }
    code, output = await curl(buf, cluster.control_address, "SubmitJob", {"spec": job})
    assert code == 0, output
    answer = json.loads(output)
    assert answer["job"]["state"] == "STATE_QUEUED"
    assert answer["plan"]["steps"] == "20"
    wrong = {"spec": {**job, "name": "No"}}
    code, output = await curl(buf, cluster.control_address, "SubmitJob", wrong)
    assert code != 0
    assert "name" in output


async def curl(buf: str, address: str, method: str, body: Any) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        buf,
        "curl",
        "--protocol",
        "grpc",
        "--http2-prior-knowledge",
        "--data",
        json.dumps(body),
        f"http://{address}/phalanx.v1.JobService/{method}",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(GUARD_S):
        output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()


async def test_an_idle_control_process_is_small(storage_only: Any) -> None:
    await storage_only.spawn_control()
    assert storage_only.process is not None
    pid = storage_only.process.pid
    maps = Path(f"/proc/{pid}/maps").read_text()
    for library in ("numpy", "scipy", "pyarrow"):
        assert library not in maps, f"control has loaded {library}"
    status = Path(f"/proc/{pid}/status").read_text()
    resident = next(line for line in status.splitlines() if line.startswith("VmRSS"))
    assert int(resident.split()[1]) < 100 * 1024


async def test_metrics_tell_what_is_there(cluster: Any) -> None:
    import urllib.request

    assert cluster.control is not None
    address = cluster.control.server.metrics_address
    async with ScriptedWorker(cluster.control_address, "w1"):
        await cluster.submit()

        def scrape() -> str:
            with urllib.request.urlopen(f"http://{address}/metrics", timeout=GUARD_S) as answer:
                return str(answer.read().decode())

        async with asyncio.timeout(GUARD_S):
            while 'phalanx_workers{state="ready"} 1.0' not in (
                text := await asyncio.to_thread(scrape)
            ):
                await asyncio.sleep(0.05)
    assert "phalanx_leader 1.0" in text
    assert "phalanx_generation 1.0" in text
    assert 'phalanx_jobs{state="queued"} 1.0' in text
    assert "phalanx_journal_append_seconds_count" in text
