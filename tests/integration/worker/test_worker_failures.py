"""Leaves that raise, crash, hang, hold the interpreter or eat memory: only the leaf suffers."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from typing import Any

import numpy as np
import psutil
import pytest

from phalanx.testing.worker_peers import ScriptedAggregator, ScriptedControl
from phalanx.v1 import coordination_service_pb2 as coordination
from phalanx.v1 import job_spec_pb2, training_pb2
from worker.session import leaf_server

GoRecord = training_pb2.GoRecord
LeafFailed = coordination.LeafFailed

ROW_OF_SHARD_2 = 40
"""Row 40 of 64 belongs to shard 2 of 4."""


async def _start(bench: Any, control: Any, aggregator: Any, nodes: Any, **settings: Any) -> Any:
    bench.own(aggregator)
    worker = await bench.worker(control.address, **settings)
    session = await control.next_session()
    await session.send(assign_job=bench.assign(nodes))
    stream = await aggregator.next_stream()
    await stream.send_version(0, 0, np.zeros(3, np.float32))
    await stream.send_go(bench.go(0))
    return worker, session, stream


@pytest.mark.parametrize(
    ("act", "kind", "words"),
    [
        ("raise_error", LeafFailed.KIND_RAISED, "this row is cursed"),
        ("lose_device", LeafFailed.KIND_RAISED, "DeviceLost: the GPU is gone"),
        ("leave", LeafFailed.KIND_RAISED, "SystemExit"),
        ("crash", LeafFailed.KIND_CRASHED, "SIGSEGV"),
        ("vanish", LeafFailed.KIND_CRASHED, "exit status 9"),
        ("hang", LeafFailed.KIND_HUNG, "no progress for 3 s"),
        ("devour", LeafFailed.KIND_OUT_OF_MEMORY, "MemoryError"),
        ("infinite", LeafFailed.KIND_NON_FINITE, "not finite"),
    ],
)
async def test_a_bad_leaf_is_named_and_the_others_go_on(
    bench: Any, act: str, kind: int, words: str
) -> None:
    bench.job(shards=4, custom={"row": ROW_OF_SHARD_2, "act": act})
    settings = {"leaf_timeout_s": 3.0} if act == "hang" else {}
    if act == "devour":
        settings["slot_memory_bytes"] = 400 * 2**20
    async with ScriptedControl() as control, ScriptedAggregator() as aggregator:
        _, session, stream = await _start(
            bench, control, aggregator, [(0, 2), (2, 1), (3, 1)], **settings
        )
        failed = await session.receive("leaf_failed")
        assert failed.kind == kind
        assert words in failed.message
        assert (failed.shard, failed.step, failed.term) == (2, 0, 1)
        assert (failed.first_row, failed.row_count) == (32, 16)
        assert failed.reason == ("DEVICE_LOST" if act == "lose_device" else "")
        if kind == LeafFailed.KIND_RAISED:
            assert "fickle.py" in failed.traceback
        frames = [(await stream.receive_frame())[0] for _ in range(2)]
        nodes = {(frame.node.first, frame.node.span) for frame in frames}
        assert nodes == {(0, 2), (3, 1)}
        assert stream.is_silent()


async def test_a_process_whose_gpu_failed_is_replaced(bench: Any, eventually: Any) -> None:
    bench.job(shards=4, custom={"row": ROW_OF_SHARD_2, "act": "lose_device"})
    async with ScriptedControl() as control, ScriptedAggregator() as aggregator:
        bench.own(aggregator)
        worker = await bench.worker(control.address)
        session = await control.next_session()
        (before,) = worker.leaf_pids
        await session.send(assign_job=bench.assign([(2, 1)]))
        stream = await aggregator.next_stream()
        await stream.send_version(0, 0, np.zeros(3, np.float32))
        await stream.send_go(bench.go(0))
        failed = await session.receive("leaf_failed")
        assert (failed.shard, failed.kind) == (2, LeafFailed.KIND_RAISED)
        await eventually(lambda: worker.leaf_pids and before not in worker.leaf_pids)


@pytest.mark.parametrize(
    ("gpus", "said"),
    [
        (("0", "0"), ""),
        (("0", "1"), "other bits in the slots 0 and 1: run a worker for each kind of GPU"),
    ],
)
async def test_slots_with_gpus_of_different_kinds_compute_nothing_together(
    bench: Any, gpus: tuple[str, ...], said: str
) -> None:
    bench.job(shards=4, custom={"act": "differ"})
    spec = job_spec_pb2.JobSpec.FromString(bench.plan.spec)
    spec.resources.gpus = 1
    bench.plan.spec = spec.SerializeToString(deterministic=True)
    bench.plan.bitwise = True
    async with ScriptedControl() as control, ScriptedAggregator() as aggregator:
        bench.own(aggregator)
        await bench.worker(control.address, slots=2, gpus=gpus)
        session = await control.next_session()
        await session.send(describe_job={"plan": bench.plan})
        own = (await session.receive("job_described")).leaf_sha256
        await session.send(assign_job=bench.assign([(0, 4)]))
        ready = await session.receive("worker_job_ready")
        assert ready.leaf_sha256 == (said or own)
        assert len(own) == 64


@pytest.mark.parametrize("act", ["split", "split_and_leave", "split_and_raise", "share_out"])
async def test_processes_that_a_leaf_forks_end_where_its_code_does(bench: Any, act: str) -> None:
    """They would go on as second leaf processes, with the socket of the first."""
    bench.job(shards=4, custom={"row": ROW_OF_SHARD_2, "act": act})
    async with ScriptedControl() as control, ScriptedAggregator() as aggregator:
        worker, session, stream = await _start(bench, control, aggregator, [(0, 4)], slots=1)
        leaves = set(worker.leaf_pids)
        for step in range(3):
            if step:
                await stream.send_version(step, 0, np.zeros(3, np.float32))
                await stream.send_go(bench.go(step))
            frame, _ = await stream.receive_frame()
            assert (frame.step, frame.example_count) == (step, 64)
        assert stream.is_silent()
        assert not session.has_received("leaf_failed")
        assert set(worker.leaf_pids) == leaves
        if act == "split_and_raise":
            assert (await session.log_line("raised in the copy")).shard == 2


async def test_leaf_processes_are_deaf_to_what_stops_a_worker(bench: Any) -> None:
    """It may be sent to all processes of the worker, which then finishes what it has begun."""
    bench.job(shards=4, custom={"row": ROW_OF_SHARD_2, "act": "nap"})
    async with ScriptedControl() as control, ScriptedAggregator() as aggregator:
        worker, session, stream = await _start(bench, control, aggregator, [(0, 4)], slots=1)
        await session.log_line("about to nap")
        for number in (signal.SIGTERM, signal.SIGINT):
            for pid in worker.leaf_pids:
                os.kill(pid, number)
        frame, _ = await stream.receive_frame()
        assert frame.example_count == 64
        assert not session.has_received("leaf_failed")


async def test_a_leaf_that_kills_its_parent_is_named_and_its_neighbours_are_not(
    bench: Any,
) -> None:
    """All leaf processes of the worker die with their server; shard 3 runs beside shard 2."""
    bench.job(shards=4, custom={"row": ROW_OF_SHARD_2, "act": "orphan"})
    async with ScriptedControl() as control, ScriptedAggregator() as aggregator:
        nodes = [(0, 2), (2, 1), (3, 1)]
        _, session, stream = await _start(bench, control, aggregator, nodes, slots=3)
        failed = await session.receive("leaf_failed")
        assert (failed.kind, failed.shard) == (LeafFailed.KIND_CRASHED, 2)
        assert (failed.first_row, failed.row_count) == (32, 16)
        assert "the process that starts leaf processes dies" in failed.message
        frames = [(await stream.receive_frame())[0] for _ in range(2)]
        assert {(frame.node.first, frame.node.span) for frame in frames} == {(0, 2), (3, 1)}
        assert not session.has_received("leaf_failed")


async def test_a_skipped_shard_is_left_out_of_its_node(bench: Any) -> None:
    bench.job(shards=4, custom={"row": ROW_OF_SHARD_2, "act": "infinite"})
    async with ScriptedControl() as control, ScriptedAggregator() as aggregator:
        _, session, stream = await _start(bench, control, aggregator, [(0, 4)], slots=2)
        failed = await session.receive("leaf_failed")
        assert failed.kind == LeafFailed.KIND_NON_FINITE
        absent = coordination.AbsentShards(job_id=bench.plan.job_id, term=1, step=0, shards=[2])
        await session.send(absent_shards=absent)
        frame, _ = await stream.receive_frame()
        assert (frame.node.first, frame.node.span) == (0, 4)
        assert frame.shard_mask == bytes([0b1011])
        assert frame.example_count == 3 * bench.plan.rows_per_leaf


async def test_a_leaf_that_holds_the_interpreter_causes_no_false_death(bench: Any) -> None:
    bench.job(shards=4, custom={"row": ROW_OF_SHARD_2, "act": "hold", "hold_s": 10})
    async with ScriptedControl() as control, ScriptedAggregator() as aggregator:
        _, session, stream = await _start(bench, control, aggregator, [(0, 4)])
        before = session.heartbeats
        frame, _ = await stream.receive_frame()
        assert frame.example_count == 64
        # The interpreter was held for five leases; heartbeats went on and nothing was reported.
        assert session.heartbeats - before >= 50
        assert not session.has_received("leaf_failed")


async def test_a_failed_leaf_is_tried_again_when_control_says_so(bench: Any) -> None:
    bench.job(shards=4, custom={"row": ROW_OF_SHARD_2, "act": "crash"})
    async with ScriptedControl() as control, ScriptedAggregator() as aggregator:
        _, session, _stream = await _start(bench, control, aggregator, [(2, 1)], slots=2)
        for placement in (2, 3):
            failed = await session.receive("leaf_failed")
            assert failed.kind == LeafFailed.KIND_CRASHED
            await session.send(assign_job=bench.assign([(2, 1)], placement=placement))
        await session.receive("leaf_failed")


async def test_what_a_leaf_prints_comes_with_worker_shard_and_step(bench: Any) -> None:
    bench.job(shards=4, custom={"row": ROW_OF_SHARD_2, "act": "talk"})
    async with ScriptedControl() as control, ScriptedAggregator() as aggregator:
        _, session, _stream = await _start(bench, control, aggregator, [(0, 4)])
        for text, level in (
            ("said by the leaf", "info"),
            ("said without Python", "info"),
            ("complained by the leaf", "error"),
        ):
            line = await session.log_line(text)
            assert (line.worker_id, line.shard, line.step) == ("worker-1", 2, 0)
            assert line.level == level
            assert line.time_unix_nanos > 0


async def test_a_traceback_is_in_the_jobs_log(bench: Any) -> None:
    bench.job(shards=4, custom={"row": ROW_OF_SHARD_2, "act": "raise_error"})
    async with ScriptedControl() as control, ScriptedAggregator() as aggregator:
        _, session, _stream = await _start(bench, control, aggregator, [(2, 1)])
        line = await session.log_line("ValueError: this row is cursed")
        assert (line.shard, line.step) == (2, 0)


async def test_a_killed_leaf_process_is_started_again(bench: Any, eventually: Any) -> None:
    bench.job(shards=4)
    async with ScriptedControl() as control, ScriptedAggregator() as aggregator:
        bench.own(aggregator)
        worker = await bench.worker(control.address)
        session = await control.next_session()
        await session.send(assign_job=bench.assign([(0, 4)]))
        stream = await aggregator.next_stream()
        await stream.send_version(0, 0, bench.version(0))
        await stream.send_go(bench.go(0))
        await stream.receive_frame()
        victims = worker.leaf_pids
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        await stream.send_version(1, 0, bench.version(1))
        await stream.send_go(bench.go(1))
        frame, _payload = await stream.receive_frame()
        assert frame.step == 1
        await eventually(lambda: worker.leaf_pids and not set(worker.leaf_pids) & set(victims))


async def test_a_worker_without_leaf_processes_says_that_it_cannot_work(
    bench: Any, eventually: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = True
    start = leaf_server._start_program

    def start_or_not(ours: socket.socket, theirs: socket.socket) -> Any:
        return subprocess.Popen(["false"], stdin=theirs) if broken else start(ours, theirs)

    async with ScriptedControl() as control:
        worker = await bench.worker(control.address)
        await control.next_session()
        told: list[bool] = []
        worker.able_changed = told.append
        monkeypatch.setattr(leaf_server, "_start_program", start_or_not)
        (leaf,) = worker.leaf_pids
        os.kill(psutil.Process(leaf).ppid(), signal.SIGKILL)
        await eventually(lambda: told == [False])
        broken = False
        await eventually(lambda: told == [False, True])
        await eventually(lambda: worker.leaf_pids)


async def test_a_job_describes_itself(bench: Any) -> None:
    bench.job(shards=4)
    layout = training_pb2.Layout()
    layout.CopyFrom(bench.plan.layout)
    sums = list(bench.plan.evaluation_sums)
    bench.plan.ClearField("layout")
    bench.plan.ClearField("evaluation_sums")
    async with ScriptedControl() as control:
        await bench.worker(control.address)
        session = await control.next_session()
        await session.send(describe_job={"plan": bench.plan})
        described = await session.receive("job_described")
        assert described.job_id == bench.plan.job_id
        assert described.layout == layout
        assert list(described.evaluation_sums) == sums
        assert len(described.leaf_sha256) == 64
        await session.send(describe_job={"plan": bench.plan})
        assert (await session.receive("job_described")).leaf_sha256 == described.leaf_sha256


async def test_rule_16_a_worker_computes_only_with_the_leaf_that_the_job_began_with(
    bench: Any,
) -> None:
    bench.job(shards=4)
    bench.plan.bitwise = True
    async with ScriptedControl() as control, ScriptedAggregator() as aggregator:
        bench.own(aggregator)
        await bench.worker(control.address)
        session = await control.next_session()
        await session.send(describe_job={"plan": bench.plan})
        own = (await session.receive("job_described")).leaf_sha256
        assign = bench.assign([(0, 4)])
        assign.leaf_sha256 = "00" * 32
        await session.send(assign_job=assign)
        stream = await aggregator.next_stream()
        await stream.send_version(0, 0, bench.version(0))
        await stream.send_go(bench.go(0))
        ready = await session.receive("worker_job_ready")
        assert (ready.leaf_sha256, ready.leaf_failed) == (own, False)
        right = bench.assign([(0, 4)], term=2)
        right.leaf_sha256 = own
        await session.send(assign_job=right)
        stream = await aggregator.next_stream()
        await stream.send_version(0, 0, bench.version(0), term=2)
        await stream.send_go(bench.go(0, term=2))
        frame, _payload = await stream.receive_frame()
        assert frame.term == 2, "nothing was computed with the other leaf"


async def test_a_leaf_that_fails_at_set_up_is_told_once_as_that_of_its_shard(bench: Any) -> None:
    bench.job(shards=4, custom={"row": 3, "act": "raise_error"})
    bench.plan.bitwise = True
    async with ScriptedControl() as control, ScriptedAggregator() as aggregator:
        bench.own(aggregator)
        await bench.worker(control.address)
        session = await control.next_session()
        assign = bench.assign([(0, 4)])
        assign.leaf_sha256 = "00" * 32
        await session.send(assign_job=assign)
        ready = await session.receive("worker_job_ready")
        assert (ready.leaf_sha256, ready.leaf_failed) == ("", True)
        assert not session.has_received("leaf_failed")
        stream = await aggregator.next_stream()
        await stream.send_version(0, 0, bench.version(0))
        await stream.send_go(bench.go(0))
        assert "cursed" in (await session.receive("leaf_failed")).message


@pytest.mark.parametrize(
    ("code", "words", "told"),
    [
        (
            "def build(schema, **arguments):\n    raise KeyError('no such layer')\n",
            "no such layer",
            "JOB_CODE",
        ),
        ("import os\nos._exit(4)\n", "exit status 4", "JOB_CODE"),
        ("import time\ntime.sleep(1000)\n", "not ready within", "JOB_CODE"),
        ("x = (\n", "SyntaxError", "JOB_CODE"),
        (
            "import phalanx.errors as e\nraise e.Aborted('PyTorch sees none', reason='NO_GPU')\n",
            "sees none",
            "NO_GPU",
        ),
        # No code of a job has it told what is for others to say.
        (
            "import phalanx.errors as e\nraise e.Aborted('wait for me', reason='NOT_LEADER')\n",
            "wait for me",
            "JOB_CODE",
        ),
    ],
)
async def test_code_that_cannot_be_described_fails_with_its_traceback(
    bench: Any, code: str, words: str, told: str
) -> None:
    bench.job(shards=4, custom={})
    bench.plan.code_digests["fickle.py"] = bench.put(code.encode())
    async with ScriptedControl() as control:
        settings = {"leaf_timeout_s": 2.0} if "sleep" in code else {}
        await bench.worker(control.address, **settings)
        session = await control.next_session()
        await session.send(describe_job={"plan": bench.plan})
        described = await session.receive("job_described")
        assert words in described.failure.message + described.failure.traceback
        assert described.failure.code == told
        if described.failure.traceback:
            line = await session.log_line(words)
            assert (line.level, line.HasField("shard"), line.HasField("step")) == (
                "error",
                False,
                False,
            )
