"""Hostile messages, other processors, taken ports and full disks around a real cluster."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest

import phalanx
from phalanx.errors import Code, FailedPrecondition, PhalanxError, ResourceExhausted
from phalanx.rpc.status import from_rpc_error
from phalanx.testing.arena import GUARD_S, SOFTMAX_MODEL, wait_until
from phalanx.testing.datasets import classification
from phalanx.v1 import dataset_service_pb2, model_service_pb2, storage_service_pb2

pytestmark = pytest.mark.slow

MEBIBYTE = 2**20
OTHER_KERNELS = {"x86_64": "Prescott", "aarch64": "ARMV8"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[phalanx.LocalCluster]:
    with phalanx.LocalCluster(workers=1, slots=2) as local:  # more slots than a stranger
        local.data.add("clouds", *classification())
        yield local


def job(**train: Any) -> dict[str, Any]:
    """A small job that works."""
    return {
        "name": "normal",
        "data": {"name": "clouds", "shards": 5},
        "train": {
            "model": {"softmax_regression": {}},
            "optimizer": {"adam": {"learning_rate": 0.05}},
            "stop": {"steps": 5},
            **train,
        },
    }


def works(cluster: phalanx.LocalCluster) -> str:
    """A normal job succeeds; its bits."""
    return cluster.submit(job()).wait(timeout_s=GUARD_S).parameters_sha256


def largest_memory_bytes(pid: int) -> int:
    """The most resident memory that a process ever had."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmHWM")


@pytest.mark.parametrize(
    ("member", "method", "streams"),
    [
        ("control-1", "JobService/SubmitJob", False),
        ("control-1", "CoordinationService/Session", True),
        ("storage", "StorageService/AppendJournal", False),
        ("storage", "StorageService/PutBlob", True),
        ("aggregator-1", "AggregationService/Exchange", True),
        ("worker-1", "AggregationService/Exchange", True),
    ],
)
def test_a_message_of_200_mb(
    cluster: phalanx.LocalCluster, member: str, method: str, streams: bool
) -> None:
    process = cluster.process(member)
    before = largest_memory_bytes(process.pid)
    message = bytes(200 * MEBIBYTE)
    options = [("grpc.max_send_message_length", -1), ("grpc.enable_http_proxy", 0)]
    with grpc.insecure_channel(process.address, options) as channel:
        path = f"/phalanx.v1.{method}"
        with pytest.raises(grpc.RpcError) as caught:
            if streams:
                list(channel.stream_stream(path)(iter([message]), timeout=GUARD_S))
            else:
                channel.unary_unary(path)(message, timeout=GUARD_S)
    error = from_rpc_error(caught.value)
    assert error.code == Code.RESOURCE_EXHAUSTED
    assert "larger than max" in error.message
    assert largest_memory_bytes(process.pid) - before < 32 * MEBIBYTE
    assert cluster.process(member).pid == process.pid
    assert works(cluster)


def test_keys_that_want_to_escape(cluster: phalanx.LocalCluster) -> None:
    pb, blob = storage_service_pb2, "../" * 8 + "etc/passwd"
    calls: list[tuple[str, Any]] = [
        ("StorageService/AppendJournal", pb.AppendJournalRequest(stream="../x", records=[b"x"])),
        ("StorageService/ReadJournal", pb.ReadJournalRequest(stream="logs/../../x")),
        ("StorageService/DeleteJournal", pb.DeleteJournalRequest(stream="/etc/passwd")),
        ("StorageService/AcquireLease", pb.AcquireLeaseRequest(name="..", holder="me")),
        ("StorageService/GetBlob", pb.GetBlobRequest(digest=blob)),
        ("StorageService/CheckBlobs", pb.CheckBlobsRequest(digests=[blob])),
        ("StorageService/RaiseTerm", pb.RaiseTermRequest(job_id="../../x")),
        (
            "DatasetService/CreateDataset",
            dataset_service_pb2.CreateDatasetRequest(name="../x", manifest_digest="0" * 64),
        ),
        (
            "DatasetService/CreateDataset",
            dataset_service_pb2.CreateDatasetRequest(name="x", manifest_digest=blob),
        ),
        ("ModelService/GetModel", model_service_pb2.GetModelRequest(name="../../x")),
    ]
    with grpc.insecure_channel(cluster.process("storage").address) as channel:
        for method, request in calls:
            raw = request.SerializeToString()
            with pytest.raises(grpc.RpcError) as caught:
                list(channel.unary_stream(f"/phalanx.v1.{method}")(raw, timeout=GUARD_S))
            error = from_rpc_error(caught.value)
            assert error.code == Code.INVALID_ARGUMENT, f"{method}: {error.code} {error.message}"
            assert ".." in error.message or "/etc/passwd" in error.message, error.message
    with pytest.raises(PhalanxError) as refused:
        cluster.data.add("../x", np.ones((4, 2)), np.arange(4) % 2)
    assert refused.value.code == Code.INVALID_ARGUMENT
    assert works(cluster)


def test_a_worker_that_computes_other_bits(cluster: phalanx.LocalCluster, tmp_path: Path) -> None:
    expected = works(cluster)
    kernels = OTHER_KERNELS.get(os.uname().machine)
    if kernels is None:
        pytest.skip("no other BLAS kernels are known for this processor")
    announce = tmp_path / "worker.json"
    command = [
        *(sys.executable, "-P", "-m", "phalanx.cli", "worker", "--id", "stranger"),
        *("--control", cluster.address, "--storage", cluster.process("storage").address),
        *("--cache-dir", str(tmp_path / "cache"), "--slots", "1"),
        *("--announce", str(announce), "--parent-pid", str(os.getpid())),
    ]
    environment = {**os.environ, "OPENBLAS_CORETYPE": kernels}
    with open(tmp_path / "log", "wb") as log:
        stranger = subprocess.Popen(command, env=environment, stderr=log)
    try:
        wait_until(
            lambda: any(w.id == "stranger" for w in cluster.describe().workers), "the stranger"
        )
        prints = {w.id: w.fingerprint for w in cluster.describe().workers}
        if prints["stranger"] == prints["worker-1"]:
            pytest.skip(f"{kernels} kernels give the same bits on this processor")
        mixed = cluster.submit(job())
        result = mixed.wait(timeout_s=GUARD_S)
        assert result.parameters_sha256 == expected
        assert result.bit_identical
        told = [e for e in cluster.events() if e.type == "WORKER_INELIGIBLE"]
        assert {(e.worker_id, e.job_id) for e in told} == {("stranger", mixed.id)}
        assert "fingerprint" in told[0].message
    finally:
        stranger.terminate()
        assert stranger.wait(timeout=GUARD_S) == 0


def test_verifying_on_a_machine_that_computes_other_bits(cluster: phalanx.LocalCluster) -> None:
    kernels = OTHER_KERNELS.get(os.uname().machine)
    if kernels is None:
        pytest.skip("no other BLAS kernels are known for this processor")
    done = cluster.submit(job())
    done.wait(timeout_s=GUARD_S)
    command = [sys.executable, "-P", "-m", "phalanx.cli", "--json", "--address", cluster.address]

    def verified(**environment: str) -> tuple[int, dict[str, Any]]:
        run = subprocess.run(
            [*command, "verify", done.id],
            env={**os.environ, **environment},
            capture_output=True,
            timeout=GUARD_S,
            check=False,
        )
        found: dict[str, Any] = json.loads(run.stdout)
        return run.returncode, found

    code, found = verified()
    assert (code, found["equal"]) == (0, True)
    code, found = verified(OPENBLAS_CORETYPE=kernels)
    if found["equal"]:
        pytest.skip(f"{kernels} kernels give the same bits on this processor")
    assert (code, found["compared"], found["balanced"]) == (6, False, True)
    assert "another numeric fingerprint" in found["not_compared"]


def test_a_port_in_use(cluster: phalanx.LocalCluster, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(FailedPrecondition) as caught:
            phalanx.LocalCluster(workers=1, port=port)
        assert f"port {port} is in use" in caught.value.message
        command = [sys.executable, "-P", "-m", "phalanx.cli", "--json"]
        up = [*command, "up", "--port", str(port), "--state", str(tmp_path / "up")]
        done = subprocess.run(up, capture_output=True, timeout=GUARD_S, check=False)
        assert done.returncode == 6
        assert f"port {port} is in use" in json.loads(done.stderr.splitlines()[-1])["message"]
        for service, arguments in (
            ("storage", ["--state", str(tmp_path / "storage")]),
            ("coordinator", ["--storage", cluster.process("storage").address]),
            ("aggregator", ["--control", cluster.address]),
        ):
            listen = ["--listen", f"127.0.0.1:{port}", "--metrics-listen", "127.0.0.1:0"]
            done = subprocess.run(
                [*command[:-1], service, *arguments, *listen],
                capture_output=True,
                timeout=GUARD_S,
                check=False,
            )
            assert done.returncode == 2, done.stderr
            assert f"127.0.0.1:{port}".encode() in done.stderr
            assert b"in use" in done.stderr
            assert b"Traceback" not in done.stderr
    assert works(cluster)


@contextlib.contextmanager
def mounted(folder: Path, size: str) -> Iterator[None]:
    """A file system of its own, so large, at a folder; the test is skipped where there is none."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs is not allowed here")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A state folder whose storage has a file system of its own with 24 MiB."""
    disk = tmp_path / "state" / "storage"
    with mounted(disk, "24m"):
        yield disk


def test_a_worker_whose_cache_is_on_a_full_disk_fails_no_job(tmp_path: Path) -> None:
    """It is asked first what the model is, as it has the smaller name, and nothing to do."""
    cache = tmp_path / "state" / "cache" / "worker-1"
    with_code = {
        **job(model={"custom": {"entrypoint": "softmax:Softmax"}}),
        "code": {"files": {"softmax.py": SOFTMAX_MODEL}},
    }
    with (
        mounted(cache, "64k"),
        phalanx.LocalCluster(workers=2, slots=1, state=tmp_path / "state") as cluster,
    ):
        with (cache / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1024))
        cluster.data.add("clouds", *classification())
        wait_until(lambda: len(cluster.workers()) == 2, "both workers")
        submitted = cluster.submit(with_code)
        sha256 = submitted.wait(timeout_s=GUARD_S).parameters_sha256
        told = [e for e in cluster.events() if e.type == "WORKER_INELIGIBLE"]
        assert told[0].worker_id == "worker-1"
        assert "No space left" in told[0].message
    with phalanx.LocalCluster(workers=0) as alone:
        alone.data.add("clouds", *classification())
        assert alone.submit(with_code).wait(timeout_s=GUARD_S).parameters_sha256 == sha256


def test_a_full_disk(small_disk: Path) -> None:
    limits = {"PHALANX_STORAGE_RESERVE_BYTES": "1MiB"}
    with phalanx.LocalCluster(
        workers=1, slots=1, state=small_disk.parent, environment=limits
    ) as cluster:
        cluster.data.add("clouds", *classification())
        expected = works(cluster)
        running = cluster.submit({**job(stop={"steps": 5}), "name": "other"})
        running.wait(timeout_s=GUARD_S)
        ballast = small_disk / "ballast"
        with ballast.open("wb") as file:
            free = os.statvfs(small_disk)
            file.write(bytes(free.f_bavail * free.f_frsize - MEBIBYTE))
        noise = np.random.default_rng(1).standard_normal((20_000, 40)).astype(np.float32)
        with pytest.raises(ResourceExhausted) as caught:
            cluster.data.add("more", noise, np.arange(20_000) % 2)
        assert caught.value.reason == "DISK_FULL"
        assert "disk" in caught.value.message
        assert not any(data.name == "more" for data in cluster.data.list())
        # A job trains on; only its model waits for space.
        waiting = cluster.submit(job())
        wait_until(lambda: waiting.refresh().progress.step == 5 or waiting.done, "the last step")
        assert not waiting.done
        ballast.unlink()
        assert waiting.wait(timeout_s=GUARD_S).parameters_sha256 == expected
        assert works(cluster) == expected
        assert all(psutil.pid_exists(p.pid) and not p.restarts for p in cluster.processes())
