"""The worker as a real process: readiness, drain, and death without orphans."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import importlib
import json
import os
import pkgutil
import platform
import select
import signal
import sys
import urllib.request
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import phalanx.v1
from phalanx.local.ports import free_ports
from phalanx.rpc.health import LIVENESS
from phalanx.testing.keys import KeyRing
from phalanx.testing.servers import ScriptedCluster
from phalanx.testing.worker_peers import DEADLINE_S, ScriptedAggregator, ScriptedControl

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class WorkerProcess:
    """A spawned worker."""

    def __init__(self, process: asyncio.subprocess.Process, announce: Path, log: Path) -> None:
        self.process = process
        self.log = log
        self._announce = announce

    @property
    def pid(self) -> int:
        return self.process.pid

    def is_announced(self) -> bool:
        return self._announce.exists()

    def announced(self) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads(self._announce.read_text())
        return facts

    def leaf_server(self) -> int:
        (server,) = _children(self.pid)
        return server

    def leaves(self) -> list[int]:
        return _children(self.leaf_server())

    def has_leaves(self) -> bool:
        """Whether there is a leaf server now, and both of its leaf processes."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            return len(self.leaves()) == 2
        return False

    async def exit_code(self) -> int:
        async with asyncio.timeout(DEADLINE_S):
            return await self.process.wait()


def _children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()]


@pytest.fixture
async def spawn(tmp_path: Path) -> AsyncIterator[Any]:
    started: list[WorkerProcess] = []

    async def start(
        control: str, storage: str, *arguments: str, program: tuple[str, ...] = ("-P", "-m")
    ) -> WorkerProcess:
        name = f"worker-{len(started)}"
        log = tmp_path / f"{name}.log"
        announce = tmp_path / f"{name}.json"
        with log.open("wb") as stderr:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *(*program, "worker", "--id", name, "--control", control),
                *("--storage", storage, "--slots", "2", "--announce", str(announce)),
                *("--cache-dir", str(tmp_path / "cache"), *arguments),
                stderr=stderr,
                cwd=tmp_path,
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
            )
        worker = WorkerProcess(process, announce, log)
        started.append(worker)
        return worker

    yield start
    for worker in started:
        with contextlib.suppress(ProcessLookupError):
            worker.process.kill()
        await worker.process.wait()


async def _gone(pidfds: list[int]) -> None:
    """Wait until all of these processes have ended."""

    def wait() -> None:
        for fd in pidfds:
            assert select.select([fd], [], [], DEADLINE_S)[0], "a leaf process outlived its session"

    await asyncio.to_thread(wait)


async def _busy_worker(
    bench: Any, spawn: Any, control: Any, aggregator: Any, cluster: Any, hold_s: float
) -> Any:
    """A worker with one leaf that holds the interpreter."""
    bench.job(shards=2, custom={"row": 1, "act": "hold", "hold_s": hold_s})
    cluster.blobs.update(bench.blobs)
    bench.own(aggregator)
    worker = await spawn(control.address, cluster.address)
    session = await control.next_session()
    await session.send(assign_job=bench.assign([(0, 2)]))
    stream = await aggregator.next_stream()
    await session.receive("worker_job_ready")
    await stream.send_version(0, 0, np.zeros(3, np.float32))
    await stream.send_go(bench.go(0))
    return worker, session, stream


async def test_a_killed_session_process_leaves_no_orphan(bench: Any, spawn: Any) -> None:
    with ScriptedCluster() as cluster:
        async with ScriptedControl() as control, ScriptedAggregator() as aggregator:
            worker, _, _ = await _busy_worker(
                bench, spawn, control, aggregator, cluster, hold_s=600
            )
            leaves = worker.leaves()
            assert len(leaves) >= 2
            assert {os.sched_getscheduler(leaf) for leaf in leaves} == {os.SCHED_BATCH}
            pidfds = [os.pidfd_open(pid) for pid in (worker.leaf_server(), *leaves)]
            # Neither who is busy nor who is stopped may stay.
            os.kill(leaves[0], signal.SIGSTOP)
            os.kill(worker.leaf_server(), signal.SIGSTOP)
            os.kill(worker.pid, signal.SIGKILL)
            try:
                await _gone(pidfds)
            finally:
                for fd in pidfds:
                    os.close(fd)


def _descriptors(pid: int) -> list[str]:
    """What a process has open, in order, without numbers that tell nothing."""
    numbers = sorted(int(name) for name in os.listdir(f"/proc/{pid}/fd"))
    return [os.readlink(f"/proc/{pid}/fd/{number}").split(":")[0] for number in numbers]


async def test_leaf_processes_inherit_nothing_of_the_session_process(
    bench: Any, spawn: Any
) -> None:
    plan = bench.job(shards=4)
    with ScriptedCluster() as cluster:
        cluster.blobs.update(bench.blobs)
        async with ScriptedControl() as control:
            worker = await spawn(control.address, cluster.address)
            session = await control.next_session()
            await session.send(describe_job={"plan": plan})
            assert (await session.receive("job_described")).leaf_sha256
            server, leaves = psutil.Process(worker.leaf_server()), worker.leaves()
            assert _descriptors(server.pid)[:2] == ["socket", "/dev/null"]
            assert len(_descriptors(server.pid)) == 3
            for leaf in map(psutil.Process, leaves):
                found = _descriptors(leaf.pid)
                assert found[:3] == ["/dev/null", "pipe", "pipe"]
                # Its own connection; the rest is memory and chunks that it has mapped.
                assert found[3:].count("socket") == 1
                assert not {"pipe", "anon_inode"} & set(found[3:])
                assert leaf.name() == "leaf"
                assert f"leaf of process {worker.pid}" in " ".join(leaf.cmdline())
            assert server.name() == "leaf-server"
            # One thread each: a fork of more copies locks that nobody will ever open.
            assert {psutil.Process(pid).num_threads() for pid in (server.pid, *leaves)} == {1}
            assert len({os.getsid(pid) for pid in (worker.pid, server.pid, *leaves)}) == 4


CHILDREN_IGNORED = """
import os, signal, sys
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
os.execv(sys.executable, [sys.executable, "-P", "-m", *sys.argv[1:]])
"""


@pytest.mark.parametrize(
    "program", [("-P", "-m"), ("-c", CHILDREN_IGNORED)], ids=["usual", "ends of children ignored"]
)
async def test_a_leaf_server_that_dies_is_replaced_and_no_leaf_is_blamed(
    bench: Any, spawn: Any, eventually: Any, program: tuple[str, ...]
) -> None:
    with ScriptedCluster() as cluster:
        async with ScriptedControl() as control, ScriptedAggregator() as aggregator:
            worker, session, stream = await _busy_worker(
                bench, partial(spawn, program=program), control, aggregator, cluster, hold_s=1
            )
            old = {worker.leaf_server(), *worker.leaves()}
            os.kill(worker.leaf_server(), signal.SIGKILL)
            frame, _ = await stream.receive_frame()
            assert (frame.step, frame.example_count) == (0, 64)
            assert not session.has_received("leaf_failed")
            await eventually(lambda: worker.has_leaves() and worker.leaf_server() not in old)
            assert not old & {worker.leaf_server(), *worker.leaves()}
            for leaf in worker.leaves():
                # Of the session process's connections, which it has by now, they have none.
                assert _descriptors(leaf).count("socket") == 1


async def test_a_leaf_server_that_is_stopped_is_woken_up(bench: Any, spawn: Any) -> None:
    with ScriptedCluster() as cluster:
        async with ScriptedControl() as control, ScriptedAggregator() as aggregator:
            worker, _, stream = await _busy_worker(
                bench, spawn, control, aggregator, cluster, hold_s=0
            )
            await stream.receive_frame()
            server = worker.leaf_server()
            os.kill(server, signal.SIGSTOP)
            for leaf in worker.leaves():
                os.kill(leaf, signal.SIGKILL)
            await stream.send_version(1, 0, np.zeros(3, np.float32))
            await stream.send_go(bench.go(1))
            frame, _ = await stream.receive_frame()
            assert frame.step == 1
            assert worker.leaf_server() == server


CLOSED = """
import os, sys
for number in range(3):
    os.close(number)
os.execv(sys.executable, [sys.executable, "-P", "-m", *sys.argv[1:]])
"""


@pytest.mark.parametrize(
    "program", [("-P", "-m"), ("-m",), ("-c", CLOSED)], ids=["usual", "unsafe path", "no streams"]
)
async def test_user_code_meets_a_process_of_its_own(
    bench: Any,
    spawn: Any,
    tmp_path: Path,
    program: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PGPASSWORD", "canary-7")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("PHALANX_WORKER_GPUS", "none")
    bench.job(shards=2, custom={"row": 1, "act": "tell"})
    with ScriptedCluster() as cluster:
        cluster.blobs.update(bench.blobs)
        async with ScriptedControl() as control, ScriptedAggregator() as aggregator:
            bench.own(aggregator)
            worker = await spawn(control.address, cluster.address, program=program)
            session = await control.next_session()
            await session.send(assign_job=bench.assign([(0, 2)]))
            stream = await aggregator.next_stream()
            found = []
            for step in range(2):
                await stream.send_version(step, 0, np.zeros(3, np.float32))
                await stream.send_go(bench.go(step))
                await stream.receive_frame()
                line = await session.log_line("facts")
                session.logs.clear()
                found.append(json.loads(line.text.removeprefix("facts ")))
                for leaf in worker.leaves():
                    os.kill(leaf, signal.SIGKILL)
            first, second = (each.pop("drawn") for each in found)
            assert not set(first) & set(second), "another process, other numbers"
            for facts in found:
                path = facts.pop("path")
                assert platform.libc_ver()[0] != "glibc" or facts["faulted"] < 100, "of 4096 pages"
                del facts["faulted"]
                assert str(tmp_path) not in path
                assert str(Path(__file__).parents[3]) in path
                assert facts == {
                    "folder": str(tmp_path),
                    "threads": "1",
                    "workspace": ":4096:8",
                    "gpus": "",
                    "read": "",
                    "session": True,
                    "core": 0,
                    "faults": True,
                    "secret": "",
                    "told": False,
                    "multiplied": 42,
                    "stopped": [-signal.SIGTERM, -signal.SIGTERM],
                }


async def test_a_drained_worker_leaves_when_its_work_has_moved(bench: Any, spawn: Any) -> None:
    with ScriptedCluster() as cluster:
        async with ScriptedControl() as control, ScriptedAggregator() as aggregator:
            worker, session, stream = await _busy_worker(
                bench, spawn, control, aggregator, cluster, hold_s=1
            )
            os.kill(worker.pid, signal.SIGTERM)
            await session.receive("drain_requested")
            # It finishes what it has begun as long as control has not moved it.
            frame, _ = await stream.receive_frame()
            assert frame.step == 0
            revoke = {"job_id": bench.plan.job_id, "term": 1, "reason": "drain"}
            await session.send(revoke_job=revoke)
            await session.receive("worker_job_released")
            assert await worker.exit_code() == 0


async def test_control_can_drain_a_worker(bench: Any, spawn: Any) -> None:
    with ScriptedCluster() as cluster:
        async with ScriptedControl() as control:
            worker = await spawn(control.address, cluster.address)
            session = await control.next_session()
            await session.send(drain={})
            assert await worker.exit_code() == 0


async def test_a_drain_without_an_answer_ends_in_time(bench: Any, spawn: Any) -> None:
    with ScriptedCluster() as cluster:
        async with ScriptedControl() as control, ScriptedAggregator() as aggregator:
            bench.job(shards=2)
            cluster.blobs.update(bench.blobs)
            bench.own(aggregator)
            worker = await spawn(control.address, cluster.address, "--drain-timeout-s", "0.5")
            session = await control.next_session()
            await session.send(assign_job=bench.assign([(0, 2)]))
            await session.receive("worker_job_ready")
            os.kill(worker.pid, signal.SIGINT)
            await session.receive("drain_requested")
            assert await worker.exit_code() == 0


async def test_metrics_and_health_are_served(bench: Any, spawn: Any, eventually: Any) -> None:
    with ScriptedCluster() as cluster:
        async with ScriptedControl() as control, ScriptedAggregator() as aggregator:
            bench.job(shards=2)
            cluster.blobs.update(bench.blobs)
            bench.own(aggregator)
            worker = await spawn(control.address, cluster.address)
            session = await control.next_session()
            await session.send(assign_job=bench.assign([(0, 2)]))
            stream = await aggregator.next_stream()
            await stream.send_version(0, 0, bench.version(0))
            await stream.send_go(bench.go(0))
            await stream.receive_frame()
            address = worker.announced()["metrics_address"]
            assert worker.announced()["role"] == "worker"

            def get(path: str) -> str:
                with urllib.request.urlopen(f"http://{address}{path}", timeout=10) as response:
                    return str(response.read().decode())

            text = await asyncio.to_thread(get, "/metrics")
            assert 'phalanx_leaf_seconds_count{outcome="done",program="train"} 2.0' in text
            assert "phalanx_cache_bytes" in text
            assert 'phalanx_cache_requests_total{outcome="miss"}' in text
            assert (await asyncio.to_thread(get, "/healthz")).strip() == "ok"


def _logged(worker: WorkerProcess, event: str) -> list[dict[str, Any]]:
    """Lines of the log that are whole."""
    *lines, _rest = worker.log.read_text().split("\n")
    return [line for line in map(json.loads, lines) if line["event"] == event]


@pytest.mark.parametrize(
    ("act", "events"),
    [
        ("crash", ("leaf_process_died", "leaf_failed")),
        ("hang", ("leaf_hung", "leaf_process_died", "leaf_failed")),
        ("raise_error", ("leaf_failed",)),
    ],
)
async def test_what_is_logged_of_a_leaf_names_worker_job_step_and_shard(
    bench: Any, spawn: Any, eventually: Any, act: str, events: tuple[str, ...]
) -> None:
    # Row 40 of 64 belongs to shard 2 of 4.
    bench.job(shards=4, custom={"row": 40, "act": act})
    async with ScriptedControl() as control, ScriptedAggregator() as aggregator:
        with ScriptedCluster() as cluster:
            cluster.blobs.update(bench.blobs)
            bench.own(aggregator)
            limits = ("--leaf-timeout-s", "3") if act == "hang" else ()
            worker = await spawn(control.address, cluster.address, *limits)
            session = await control.next_session()
            await session.send(assign_job=bench.assign([(0, 4)]))
            stream = await aggregator.next_stream()
            await session.receive("worker_job_ready")
            await stream.send_version(5, 0, np.zeros(3, np.float32))
            await stream.send_go(bench.go(5))
            await session.receive("leaf_failed")
            await eventually(lambda: all(_logged(worker, event) for event in events))
            for event in events:
                line = _logged(worker, event)[0]
                names = (line["worker_id"], line["job_id"], line["step"], line["shard"])
                assert names == ("worker-0", bench.plan.job_id, 5, 2), event


async def test_what_is_logged_of_a_job_that_cannot_be_set_up_names_it(
    bench: Any, spawn: Any, eventually: Any
) -> None:
    bench.job(shards=4, custom={})
    bench.plan.code_digests["fickle.py"] = bench.put(b"x = (\n")
    async with ScriptedControl() as control, ScriptedAggregator() as aggregator:
        with ScriptedCluster() as cluster:
            cluster.blobs.update(bench.blobs)
            bench.own(aggregator)
            worker = await spawn(control.address, cluster.address)
            session = await control.next_session()
            await session.send(assign_job=bench.assign([(0, 4)]))
            await eventually(lambda: _logged(worker, "job_set_up_failed"))
            line = _logged(worker, "job_set_up_failed")[0]
            assert (line["worker_id"], line["job_id"]) == ("worker-0", bench.plan.job_id)
            assert "SyntaxError" in line["message"]


async def test_health_is_about_the_worker_and_not_about_control(
    spawn: Any, tmp_path: Path, eventually: Any
) -> None:
    with ScriptedCluster() as cluster:
        async with ScriptedControl() as control:
            worker = await spawn(control.address, cluster.address)
            await control.next_session()
            await eventually(worker.is_announced)
        announced = worker.announced()

        def status() -> int:
            connection = http.client.HTTPConnection(announced["metrics_address"], timeout=10)
            with contextlib.closing(connection):
                connection.request("GET", "/healthz")
                return connection.getresponse().status

        async def become(wanted: int) -> None:
            async with asyncio.timeout(DEADLINE_S):
                while await asyncio.to_thread(status) != wanted:
                    await asyncio.sleep(0.05)

        await eventually(lambda: b'"session_ended"' in worker.log.read_bytes())
        assert await asyncio.to_thread(status) == 200, "to end it would not bring control back"
        async with grpc.aio.insecure_channel(announced["address"]) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)

            async def serves() -> bool:
                answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=DEADLINE_S)
                return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

            assert await serves()
            blobs, elsewhere = tmp_path / "cache" / "blobs", tmp_path / "elsewhere"
            blobs.rename(elsewhere)
            await become(503)
            assert not await serves()
            elsewhere.rename(blobs)
            await become(200)
            assert await serves()


async def test_wrong_settings_are_named(spawn: Any) -> None:
    worker = await spawn("nowhere", "127.0.0.1:1", "--labels", "zone", "--slot-memory-bytes", "1k")
    assert await worker.exit_code() == 2
    text = worker.log.read_text()
    assert "--control" in text


def _methods() -> list[str]:
    """Every method of every service, and what is served beside them."""
    found = [
        "/grpc.health.v1.Health/Watch",
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    ]
    for each in pkgutil.iter_modules(phalanx.v1.__path__):
        module = importlib.import_module(f"phalanx.v1.{each.name}")
        if descriptor := getattr(module, "DESCRIPTOR", None):
            for service in descriptor.services_by_name.values():
                found += [f"/{service.full_name}/{method.name}" for method in service.methods]
    return found


async def test_strangers_may_probe_a_worker_with_keys_and_do_nothing_else(
    bench: Any, spawn: Any, tmp_path: Path
) -> None:
    """As the kubelet does: in plaintext, from before the start to the end."""
    ring = KeyRing(tmp_path / "keys")
    flags = [
        word
        for name, value in ring.flags("worker").items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    probe = f"127.0.0.1:{free_ports(1)[0]}"
    async with (
        ScriptedControl(keys=ring.server()) as control,
        grpc.aio.insecure_channel(probe) as channel,
    ):
        stub: Any = health_pb2_grpc.HealthStub(channel)

        async def state(service: str = "") -> int:
            request = health_pb2.HealthCheckRequest(service=service)
            answer = await stub.Check(request, timeout=DEADLINE_S, wait_for_ready=True)
            return int(answer.status)

        # There is no storage: a job stays assigned, and is not computed.
        worker = await spawn(control.address, "127.0.0.1:1", *flags, "--probe-listen", probe)
        assert await state(LIVENESS) == SERVING
        session = await control.next_session()
        async with asyncio.timeout(DEADLINE_S):
            while await state() != SERVING:
                await asyncio.sleep(0.01)
        for path in _methods():
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await channel.unary_unary(path)(b"", timeout=DEADLINE_S)
            assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED, path
        # What it hosts holds it back; what it hosts, it says when it comes back.
        bench.job(shards=2)
        await session.send(assign_job=bench.assign([(0, 2)]))
        session.break_off()
        session = await control.next_session()
        assert session.hello.held_jobs
        assert await state() == SERVING
        os.kill(worker.pid, signal.SIGTERM)
        await session.receive("drain_requested")
        assert (await state(), await state(LIVENESS)) == (NOT_SERVING, SERVING)
        await session.send(revoke_job={"job_id": bench.plan.job_id, "term": 1})
        assert await worker.exit_code() == 0
