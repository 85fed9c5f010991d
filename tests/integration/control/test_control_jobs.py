"""Jobs from submission to their end, over real gRPC."""

from __future__ import annotations

import asyncio
import hashlib
import json
from typing import Any

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2, status_pb2

from coordinator.control import job_servicer
from phalanx.clients.storage import StorageClient
from phalanx.rpc.status import from_rpc_error
from phalanx.testing.members import ScriptedAggregator, ScriptedWorker
from phalanx.v1 import coordination_service_pb2 as pb
from phalanx.v1 import job_service_pb2, model_service_pb2
from phalanx.v1.job_pb2 import Job, MetricPoint
from phalanx.v1.job_spec_pb2 import Data, JobSpec

GUARD_S = 30.0


async def details_of(call: Any, kind: Any) -> tuple[grpc.StatusCode, Any]:
    """Return the code and one detail message of a call that fails."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    trailer = dict(caught.value.trailing_metadata())["grpc-status-details-bin"]
    assert isinstance(trailer, bytes)
    for each in status_pb2.Status.FromString(trailer).details:
        found = kind()
        if each.Unpack(found):
            return caught.value.code(), found
    return caught.value.code(), None


async def test_a_job_runs_and_leaves_a_model(cluster: Any) -> None:
    async with (
        ScriptedAggregator(cluster.control_address, "a1") as aggregator,
        ScriptedWorker(cluster.control_address, "w1") as worker,
    ):
        job = await cluster.submit()
        assert job.state == Job.STATE_QUEUED
        assert job.spec.data.name == "digits@1"
        assigned = await worker.wait_for("assign_job", lambda each: bool(each.train_nodes))
        assert assigned.plan.shards == 8
        assert JobSpec.FromString(assigned.plan.spec) == job.spec
        await aggregator.wait_for("assign_ranges")
        aggregator.report(job.id, 10, metrics={"train/loss": 0.5})
        parameters = await cluster.finish(aggregator, job.id)
        ended = await cluster.wait_for_state(job.id, "SUCCEEDED")
        assert ended.result.parameters_sha256 == hashlib.sha256(parameters).hexdigest()
        assert ended.result.model == "job@1"
        assert ended.result.metrics["test/accuracy"] == 0.875
        assert ended.result.bit_identical
        await aggregator.wait_for("release_ranges")
        await worker.wait_for("revoke_job")
    request = model_service_pb2.GetModelRequest(namespace="default", name="job")
    model = (await cluster.models().GetModel(request, timeout=GUARD_S)).model
    assert [file.path for file in model.files] == ["model.safetensors", "README.md", "model.json"]
    assert model.job_id == job.id
    again = job_service_pb2.SubmitJobRequest(spec=job.spec, validate_only=True)
    again.spec.namespace = "team"
    again.spec.data.name, again.spec.train.start.model = "default/digits", "default/job"
    code, bad = await details_of(
        cluster.jobs().SubmitJob(again, timeout=GUARD_S), error_details_pb2.BadRequest
    )
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert [each.field for each in bad.field_violations] == ["train.start.model"]
    assert "'weights' in the shape [8, 2]" in bad.field_violations[0].description
    # The kind of model that the scripted worker says it has built.
    again.spec.train.model.softmax_regression.bias = False
    planned = (await cluster.jobs().SubmitJob(again, timeout=GUARD_S)).job.spec
    assert (planned.data.name, planned.train.start.model) == ("default/digits@1", "default/job@1")


async def test_columns_are_chosen_from_those_of_the_manifest(cluster: Any) -> None:
    job = await cluster.submit(data=Data(name="digits", features=["x8", "x2"]))
    assert list(job.spec.data.features) == ["x2", "x8"]
    every = [f"x{number}" for number in range(8, 0, -1)]
    whole = await cluster.submit(data=Data(name="digits", features=every))
    plain = await cluster.submit(data=Data(name="digits"))
    assert whole.spec_sha256 == plain.spec_sha256 != job.spec_sha256
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cluster.submit(data=Data(name="digits", features=["x2", "x9"]))
    error = from_rpc_error(caught.value)
    assert error.reason == "SPEC_INVALID"
    assert [each.field for each in error.violations] == ["data.features[1]"]
    assert "x1 to x8" in error.violations[0].message


async def test_a_model_of_other_columns_is_no_start(cluster: Any) -> None:
    shapes = {"weights": [2], "bias": [1]}
    header = json.dumps(
        {
            name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}
            for name, shape in shapes.items()
        }
    ).encode()
    columns = {"columns": [{"name": "x1"}, {"name": "x3"}], "chosen_from": {"count": 8}}
    contents = {
        "model.safetensors": len(header).to_bytes(8, "little") + header + bytes(12),
        "model.json": json.dumps(columns).encode(),
    }
    async with StorageClient(cluster.storage_address) as storage:
        files = [
            model_service_pb2.ModelFile(path=path, digest=await storage.put_blob(content))
            for path, content in contents.items()
        ]
        await storage.create_model(model_service_pb2.ModelVersion(name="few", files=files))
    train = (await cluster.submit()).spec.train
    train.start.model = "few"
    same = await cluster.submit(data=Data(name="digits", features=["x3", "x1"]), train=train)
    assert same.spec.train.start.model == "few@1"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cluster.submit(data=Data(name="digits", features=["x1", "x2"]), train=train)
    error = from_rpc_error(caught.value)
    assert error.reason == "START_MODEL_MISFIT"
    (violation,) = error.violations
    assert violation.field == "train.start.model"
    assert "trained on the columns x1, x3, and this job is on x1, x2" in violation.message


async def test_the_same_request_id_gives_the_first_answer(cluster: Any) -> None:
    first, second = await asyncio.gather(cluster.submit("nightly-1"), cluster.submit("nightly-1"))
    assert first == second
    third = await cluster.submit("nightly-1")
    assert third == first
    other = await cluster.submit("nightly-2")
    assert other.id != first.id


async def test_a_request_id_with_another_spec_is_refused(cluster: Any, make_spec: Any) -> None:
    await cluster.submit("nightly-1")
    request = job_service_pb2.SubmitJobRequest(spec=make_spec(seed=7), request_id="nightly-1")
    code, info = await details_of(
        cluster.jobs().SubmitJob(request, timeout=GUARD_S), error_details_pb2.ErrorInfo
    )
    assert code == grpc.StatusCode.ALREADY_EXISTS
    assert info.reason == "REQUEST_ID_REUSED"


async def test_every_wrong_field_is_named_at_once(cluster: Any, make_spec: Any) -> None:
    wrong = make_spec(name="No Name")
    wrong.train.optimizer.sgd.learning_rate = -0.1
    wrong.train.stop.epochs = float("nan")
    wrong.train.model.mlp.hidden.append(0)
    request = job_service_pb2.SubmitJobRequest(spec=wrong)
    code, bad = await details_of(
        cluster.jobs().SubmitJob(request, timeout=GUARD_S), error_details_pb2.BadRequest
    )
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert {each.field for each in bad.field_violations} == {
        "name",
        "train.optimizer.sgd.learning_rate",
        "train.stop.epochs",
        "train.model.mlp.hidden[0]",
    }


async def test_what_is_not_carried_out_is_refused_with_its_path(
    cluster: Any, make_spec: Any
) -> None:
    asked = make_spec()
    asked.train.local.steps, asked.train.local.fragments = 2, 3
    request = job_service_pb2.SubmitJobRequest(spec=asked)
    code, bad = await details_of(
        cluster.jobs().SubmitJob(request, timeout=GUARD_S), error_details_pb2.BadRequest
    )
    assert code == grpc.StatusCode.UNIMPLEMENTED
    assert [each.field for each in bad.field_violations] == ["train.local.fragments"]


async def test_a_missing_data_set_is_named(cluster: Any, make_spec: Any) -> None:
    asked = make_spec()
    asked.data.name = "nothing"
    request = job_service_pb2.SubmitJobRequest(spec=asked)
    with pytest.raises(grpc.aio.AioRpcError, match="there is no data set 'nothing'") as caught:
        await cluster.jobs().SubmitJob(request, timeout=GUARD_S)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


async def test_validate_only_plans_and_keeps_nothing(cluster: Any, make_spec: Any) -> None:
    async with ScriptedWorker(cluster.control_address, "w1"):
        request = job_service_pb2.SubmitJobRequest(spec=make_spec(), validate_only=True)
        answer = await cluster.jobs().SubmitJob(request, timeout=GUARD_S)
    assert answer.plan.steps == 20
    assert answer.plan.eligible_workers == 1
    assert answer.job.spec.output.model == "job"
    listed = await cluster.jobs().ListJobs(job_service_pb2.ListJobsRequest(), timeout=GUARD_S)
    assert not listed.jobs


async def test_watching_shows_the_job_first_its_events_and_the_job_last(cluster: Any) -> None:
    async with (
        ScriptedAggregator(cluster.control_address, "a1") as aggregator,
        ScriptedWorker(cluster.control_address, "w1"),
    ):
        job = await cluster.submit()
        updates: list[Any] = []

        async def watch() -> None:
            request = job_service_pb2.WatchJobRequest(job_id=job.id)
            async for update in cluster.jobs().WatchJob(request, timeout=GUARD_S):
                updates.append(update)  # noqa: PERF401 - the test looks at it meanwhile

        watching = asyncio.create_task(watch())
        await cluster.wait_for_state(job.id, "RUNNING")
        aggregator.report(job.id, 10, metrics={"train/loss": 0.5})
        async with asyncio.timeout(GUARD_S):
            while not any(each.HasField("progress") for each in updates):
                await asyncio.sleep(0.01)
        await cluster.finish(aggregator, job.id)
        async with asyncio.timeout(GUARD_S):
            await watching
    assert updates[0].HasField("job")
    assert updates[-1].job.state == Job.STATE_SUCCEEDED
    states = [each.job.state for each in updates if each.HasField("job")]
    assert states == sorted(states)
    assert Job.STATE_RUNNING in states
    events = [each.event for each in updates if each.HasField("event")]
    assert events[0].type == "JOB_QUEUED"
    assert events[-1].type == "JOB_SUCCEEDED"
    assert all(event.job_id == job.id for event in events)
    sequences = [event.sequence for event in events]
    assert sequences == sorted(set(sequences))
    request = job_service_pb2.WatchJobRequest(job_id=job.id, after_sequence=sequences[1])
    call = cluster.jobs().WatchJob(request, timeout=GUARD_S)
    assert [each.event async for each in call if each.HasField("event")] == events[2:]


async def test_cancel_pause_and_resume(cluster: Any) -> None:
    stub = cluster.jobs()
    async with (
        ScriptedAggregator(cluster.control_address, "a1") as aggregator,
        ScriptedWorker(cluster.control_address, "w1"),
    ):
        job = await cluster.submit()
        await cluster.wait_for_state(job.id, "RUNNING")
        request = job_service_pb2.PauseJobRequest(job_id=job.id, request_id="p1")
        answer = await stub.PauseJob(request, timeout=GUARD_S)
        assert answer.job.reason == "PAUSING"
        await aggregator.wait_for("job_command")
        await cluster.commit(job.id, 12)
        aggregator.report(job.id, 12, outcome=pb.JobReport.OUTCOME_PAUSED, checkpoint_step=12)
        await cluster.wait_for_state(job.id, "PAUSED")
        resume = job_service_pb2.ResumeJobRequest(job_id=job.id)
        await stub.ResumeJob(resume, timeout=GUARD_S)
        assigned = await aggregator.wait_for("assign_ranges", lambda each: each.term == 2)
        assert assigned.restore.step == 12
        cancel = job_service_pb2.CancelJobRequest(job_id=job.id, reason="enough")
        cancelled = await stub.CancelJob(cancel, timeout=GUARD_S)
        assert (cancelled.job.state, cancelled.job.message) == (Job.STATE_CANCELLED, "enough")
        code, info = await details_of(
            stub.CancelJob(cancel, timeout=GUARD_S), error_details_pb2.ErrorInfo
        )
        assert (code, info.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "WRONG_STATE")


async def test_delete_removes_the_job_and_its_traces(cluster: Any) -> None:
    job = await cluster.submit()
    stub = cluster.jobs()
    delete = job_service_pb2.DeleteJobRequest(job_id=job.id)
    code, _ = await details_of(stub.DeleteJob(delete, timeout=GUARD_S), error_details_pb2.ErrorInfo)
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    await stub.CancelJob(job_service_pb2.CancelJobRequest(job_id=job.id), timeout=GUARD_S)
    await stub.DeleteJob(delete, timeout=GUARD_S)
    code, _ = await details_of(cluster.job(job.id), error_details_pb2.ErrorInfo)
    assert code == grpc.StatusCode.NOT_FOUND


async def test_lists_come_in_pages_newest_first(cluster: Any) -> None:
    ids = [(await cluster.submit()).id for _ in range(5)]
    stub, seen, token = cluster.jobs(), [], ""
    for size in (2, 2, 1):
        request = job_service_pb2.ListJobsRequest(page_size=2, page_token=token)
        page = await stub.ListJobs(request, timeout=GUARD_S)
        assert len(page.jobs) == size
        seen += [job.id for job in page.jobs]
        token = page.next_page_token
    assert not token
    assert seen == ids[::-1]
    request = job_service_pb2.ListJobsRequest(states=[Job.STATE_RUNNING])
    assert not (await stub.ListJobs(request, timeout=GUARD_S)).jobs
    for wrong, field in (({"page_token": "x"}, "page_token"), ({"namespace": "a b"}, "namespace")):
        code, details = await details_of(
            stub.ListJobs(job_service_pb2.ListJobsRequest(**wrong), timeout=GUARD_S),
            error_details_pb2.BadRequest,
        )
        assert code == grpc.StatusCode.INVALID_ARGUMENT
        assert details.field_violations[0].field == field


async def test_logs_and_metric_points_are_kept(cluster: Any) -> None:
    stub = cluster.jobs()
    async with (
        ScriptedAggregator(cluster.control_address, "a1") as aggregator,
        ScriptedWorker(cluster.control_address, "w1") as worker,
    ):
        job = await cluster.submit()
        await cluster.wait_for_state(job.id, "RUNNING")
        lines = [
            pb.JobLogLine(time_unix_nanos=n + 1, shard=n, level="info", text=f"line {n}")
            for n in range(3)
        ]
        worker.say(job_log_lines=pb.JobLogLines(job_id=job.id, lines=lines))
        points = [MetricPoint(step=n, name="train/loss", value=1.0 / (n + 1)) for n in range(4)]
        for _ in range(2):  # a replay sends the same points again
            aggregator.say(metric_points=pb.MetricPoints(job_id=job.id, points=points))
        request = job_service_pb2.ListJobMetricsRequest(job_id=job.id)
        async with asyncio.timeout(GUARD_S):
            while len((await stub.ListJobMetrics(request, timeout=GUARD_S)).points) < 4:
                await asyncio.sleep(0.02)
        found = (await stub.ListJobMetrics(request, timeout=GUARD_S)).points
        assert [(each.step, each.value) for each in found] == [(n, 1.0 / (n + 1)) for n in range(4)]
        logs = job_service_pb2.ReadJobLogsRequest(job_id=job.id, follow=True)
        read = []
        async for line in stub.ReadJobLogs(logs, timeout=GUARD_S):
            read.append((line.worker_id, line.shard, line.text))
            if len(read) == 3:
                break
        assert read == [("w1", n, f"line {n}") for n in range(3)]


async def test_who_follows_a_log_gets_the_lines_that_come_after_the_end(
    cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers collect them for a moment, and a short job is over by then."""
    monkeypatch.setattr(job_servicer, "LINES_COME_LATE_S", GUARD_S)
    stub = cluster.jobs()
    async with (
        ScriptedAggregator(cluster.control_address, "a1"),
        ScriptedWorker(cluster.control_address, "w1") as worker,
    ):
        job = await cluster.submit()
        await cluster.wait_for_state(job.id, "RUNNING")
        await stub.CancelJob(job_service_pb2.CancelJobRequest(job_id=job.id), timeout=GUARD_S)
        await cluster.wait_for_state(job.id, "CANCELLED")
        logs = job_service_pb2.ReadJobLogsRequest(job_id=job.id, follow=True)
        call = stub.ReadJobLogs(logs, timeout=GUARD_S)
        reading = asyncio.ensure_future(call.read())
        await asyncio.sleep(0)
        line = pb.JobLogLine(time_unix_nanos=1, level="info", text="the last line")
        worker.say(job_log_lines=pb.JobLogLines(job_id=job.id, lines=[line]))
        assert (await reading).text == "the last line"
        monkeypatch.setattr(job_servicer, "LINES_COME_LATE_S", 0.0)
        again = [each.text async for each in stub.ReadJobLogs(logs, timeout=GUARD_S)]
        assert again == ["the last line"]
        for odd in (Timestamp(seconds=2**62), Timestamp(nanos=-1)):
            logs.after_time.CopyFrom(odd)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.ReadJobLogs(logs, timeout=GUARD_S).read()
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "after_time is no time" in refused.value.details()


async def test_code_travels_as_blobs(cluster: Any, make_spec: Any) -> None:
    asked = make_spec()
    asked.code.files["net.py"] = "def build(schema): ..."
    asked.train.model.custom.entrypoint = "net:build"
    async with (
        ScriptedAggregator(cluster.control_address, "a1"),
        ScriptedWorker(cluster.control_address, "w1") as worker,
    ):
        request = job_service_pb2.SubmitJobRequest(spec=asked)
        await cluster.jobs().SubmitJob(request, timeout=GUARD_S)
        described = await worker.wait_for("describe_job")
    digest = hashlib.sha256(b"def build(schema): ...").hexdigest()
    assert dict(described.plan.code_digests) == {"net.py": digest}


async def test_code_is_refused_where_strangers_can_reach_the_cluster(
    storage_only: Any, make_spec: Any
) -> None:
    await storage_only.start_control()
    assert storage_only.control is not None
    object.__setattr__(storage_only.control.config, "listen", "0.0.0.0:7410")
    asked = make_spec()
    asked.code.files["net.py"] = "pass"
    request = job_service_pb2.SubmitJobRequest(spec=asked)
    code, info = await details_of(
        storage_only.jobs().SubmitJob(request, timeout=GUARD_S), error_details_pb2.ErrorInfo
    )
    assert (code, info.reason) == (grpc.StatusCode.PERMISSION_DENIED, "CODE_NOT_ALLOWED")
