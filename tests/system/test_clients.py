"""Clients that are not ours: buf curl, a raw reflection client, health probes and scrapers."""

import json
import os
import re
import shutil
import subprocess
import sysconfig
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool, json_format, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

import phalanx
from phalanx.errors import Code
from phalanx.rpc.status import from_rpc_error
from phalanx.specs.documents import load_yaml
from phalanx.testing.arena import GUARD_S
from phalanx.testing.datasets import REPOSITORY, demo_data
from tests.system import documents
from tests.system.documents import json_values

pytestmark = pytest.mark.slow

SERVICES = {
    "control": ["JobService", "ClusterService", "CoordinationService"],
    "storage": ["StorageService", "DatasetService", "ModelService"],
    "aggregator": ["AggregationService", "TaskService"],
    "worker": ["AggregationService"],
}
METRICS = {
    "control": "build_info leader generation workers slots jobs job_queue_seconds tasks_total "
    "redispatches_total recovery_seconds dead_letters journal_append_seconds journal_lag_records",
    "aggregator": "job_step job_metric job_examples_total job_examples_lost_total "
    "job_examples_doubled_total step_seconds steps_replayed_total staleness_versions "
    "task_round_trip_seconds "
    "verified_leaves_total outvoted_copies_total "
    "wire_bytes_total wire_uncompressed_bytes_total checkpoint_seconds "
    "checkpoint_last_success_timestamp_seconds",
    "worker": "leaf_seconds cache_bytes cache_requests_total member_bytes_total",
    "storage": "storage_operation_seconds storage_bytes storage_corruptions_total",
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[phalanx.LocalCluster]:
    with phalanx.LocalCluster(workers=2, slots=1) as local:
        local.data.add("fashion", demo_data())
        yield local


def readme_job() -> dict[str, Any]:
    """The job of the README as JSON."""
    text = (REPOSITORY / "README.md").read_text()
    [block] = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    return json_format.MessageToDict(load_yaml(block))


def buf_curl(address: str, method: str, request: dict[str, Any]) -> list[dict[str, Any]]:
    """Call a method through reflection; the responses."""
    buf = shutil.which("buf", path=sysconfig.get_path("scripts")) or shutil.which("buf")
    if buf is None:
        pytest.skip("buf is not installed")
    command = [buf, "curl", "--http2-prior-knowledge", "--protocol", "grpc", "-d", "@-"]
    done = subprocess.run(
        [*command, f"http://{address}/phalanx.v1.{method}"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=GUARD_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json_values(done.stdout)


def test_grpcurl_and_buf_curl_submit_the_job_of_the_readme_and_it_is_the_same(
    cluster: phalanx.LocalCluster, tmp_path: Path
) -> None:
    """By the one command there is for a cluster without keys, as it stands."""
    [(document, command)] = documents.calls_by_grpcurl(plaintext=True)
    assert document == "README.md"
    (tmp_path / "job.json").write_text(json.dumps({"spec": readme_job()}))
    [answer] = buf_curl(cluster.address, "JobService/SubmitJob", {"spec": readme_job()})
    job_id = answer["job"]["id"]
    assert job_id.startswith("fashion-mlp-")
    path = f"{documents.install(tmp_path / 'bin', 'grpcurl')}:{os.environ['PATH']}"
    here = command.replace("localhost:7410", cluster.address)
    assert here != command
    [answer] = documents.run_grpcurl(here, tmp_path, {"PATH": path})
    assert answer["plan"]["steps"]
    other = cluster.get(answer["job"]["id"])
    assert other.id != job_id
    updates = buf_curl(cluster.address, "JobService/WatchJob", {"jobId": job_id})
    assert "job" in updates[0]
    assert updates[-1]["job"]["state"] == "STATE_SUCCEEDED"
    sequences = [int(u["event"]["sequence"]) for u in updates if "event" in u]
    assert sequences == sorted(set(sequences))
    result = updates[-1]["job"]["result"]
    assert result["metrics"]["test/accuracy"] >= 0.85
    assert other.wait(timeout_s=GUARD_S).parameters_sha256 == result["parametersSha256"]


class RawClient:
    """Knows nothing but what reflection tells."""

    def __init__(self, address: str) -> None:
        self.channel = grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)])
        self.pool = descriptor_pool.DescriptorPool(ProtoReflectionDescriptorDatabase(self.channel))

    def new(self, name: str) -> Any:
        descriptor = self.pool.FindMessageTypeByName(f"phalanx.v1.{name}")
        return message_factory.GetMessageClass(descriptor)()

    def call(self, method: str, request: bytes, response: str) -> Any:
        service, _, name = method.partition("/")
        described = self.pool.FindServiceByName(f"phalanx.v1.{service}").methods_by_name[name]
        assert described.output_type.name == response
        call: Any = self.channel.unary_unary(f"/phalanx.v1.{method}")
        answer = self.new(response)
        answer.ParseFromString(call(request, timeout=GUARD_S))
        return answer


def test_a_raw_client_sends_what_other_tools_let_through(cluster: phalanx.LocalCluster) -> None:
    client = RawClient(cluster.address)
    try:
        first, second = (client.new("SubmitJobRequest") for _ in range(2))
        json_format.ParseDict({"spec": readme_job(), "validateOnly": True}, first)
        first.spec.train.model.softmax_regression.SetInParent()  # one member of the oneof,
        second.spec.train.model.mlp.hidden.append(8)  # and on the wire another one behind it
        second.spec.train.synchronous.SetInParent()  # what a tolerant tool makes of null
        second.spec.train.stop.wall_time.seconds = 1800  # what it makes of 30m
        wire = first.SerializeToString() + second.SerializeToString()
        answer = client.call("JobService/SubmitJob", wire, "SubmitJobResponse")
        train = answer.job.spec.train
        assert train.model.WhichOneof("kind") == "mlp"
        assert list(train.model.mlp.hidden) == [8]
        assert train.WhichOneof("consistency") == "synchronous"
        assert train.stop.wall_time.seconds == 1800
        assert answer.plan.steps > 0
        empty = client.new("SubmitJobRequest").SerializeToString()
        with pytest.raises(grpc.RpcError) as caught:
            client.call("JobService/SubmitJob", empty, "SubmitJobResponse")
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(grpc.RpcError) as caught:
            client.call("JobService/SubmitJob", b"\xff\xff\xff", "SubmitJobResponse")
        error = from_rpc_error(caught.value)
        assert (error.code, error.reason) == (Code.INVALID_ARGUMENT, "MALFORMED_MESSAGE")
        assert "SubmitJob was sent 3 bytes" in error.message
    finally:
        client.channel.close()


def test_bytes_that_are_no_message_in_a_stream(cluster: phalanx.LocalCluster) -> None:
    for role, method in (
        ("control-1", "CoordinationService/Session"),
        ("storage", "StorageService/PutBlob"),
        ("aggregator-1", "AggregationService/Exchange"),
    ):
        with grpc.insecure_channel(cluster.process(role).address) as channel:
            call: Any = channel.stream_stream(f"/phalanx.v1.{method}")
            with pytest.raises(grpc.RpcError) as caught:
                list(call(iter([b"\xff\xff\xff"]), timeout=GUARD_S))
            error = from_rpc_error(caught.value)
            assert error.code == Code.INVALID_ARGUMENT, f"{method}: {error.code} {error.message}"


def test_every_service_is_healthy(cluster: phalanx.LocalCluster) -> None:
    for process in cluster.processes():
        with grpc.insecure_channel(process.address) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            for name in ["", *(f"phalanx.v1.{service}" for service in SERVICES[process.role])]:
                answer = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=GUARD_S)
                assert answer.status == health_pb2.HealthCheckResponse.SERVING, name


def test_reflection_can_be_switched_off_everywhere() -> None:
    with phalanx.LocalCluster(workers=1, environment={"PHALANX_REFLECTION": "false"}) as local:
        servers = local.processes()
        assert sorted(process.role for process in servers) == sorted(SERVICES)
        for process in servers:
            with grpc.insecure_channel(process.address) as channel:
                stub: Any = health_pb2_grpc.HealthStub(channel)
                stub.Check(health_pb2.HealthCheckRequest(), timeout=GUARD_S)
                client = RawClient(process.address)
                try:
                    with pytest.raises(grpc.RpcError) as caught:
                        client.new("JobSpec")
                finally:
                    client.channel.close()
                assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_every_process_answers_scrapers(cluster: phalanx.LocalCluster) -> None:
    spec = {**readme_job(), "name": "scraped"}
    spec["train"]["stop"] = {"steps": 3}
    cluster.submit(spec).wait(timeout_s=GUARD_S)
    seen = set()
    for process in cluster.processes():
        base = f"http://{process.metrics_address}"
        with urllib.request.urlopen(f"{base}/healthz", timeout=GUARD_S) as response:
            assert response.status == 200
        with urllib.request.urlopen(f"{base}/metrics", timeout=GUARD_S) as response:
            text = response.read().decode()
        names = set(re.findall(r"^# TYPE (\S+) ", text, re.MULTILINE))
        for name in METRICS[process.role].split():
            assert f"phalanx_{name}" in names or f"phalanx_{name}_total" in names, name
        assert {"grpc_server_handled_total", "grpc_server_handling_seconds"} <= names
        seen.add(process.role)
    assert seen == set(METRICS)


def test_the_stubs_that_ship_are_what_reflection_tells(cluster: phalanx.LocalCluster) -> None:
    client = RawClient(cluster.address)
    try:
        spec = client.pool.FindMessageTypeByName("phalanx.v1.JobSpec")
        shipped = type(phalanx.load(Path(REPOSITORY / "examples/demo/job.yaml"))).DESCRIPTOR
        assert [f.name for f in spec.fields] == [f.name for f in shipped.fields]
    finally:
        client.channel.close()
