"""The session with control: it may come and go, training goes on."""

from __future__ import annotations

import asyncio
import importlib.util
from typing import Any

import pytest

from phalanx.reduction import Node
from phalanx.testing.worker_peers import ScriptedAggregator, ScriptedControl


async def test_the_hello_says_who_the_worker_is(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.session.app.gpu_kinds", lambda gpus: [f"NVIDIA {gpus[0]}"])
    async with ScriptedControl() as control:
        settings: dict[str, Any] = {
            "labels": ("zone=a", "disk=ssd"),
            "slot_memory_bytes": 2**30,
            "gpus": ("GPU-1", "GPU-2"),
        }
        await bench.worker(control.address, slots=3, **settings)
        hello = (await control.next_session()).hello
        assert (hello.worker_id, hello.slots, hello.slot_memory_bytes) == ("worker-1", 3, 2**30)
        assert dict(hello.labels) == {"zone": "a", "disk": "ssd"}
        assert hello.gpus == 2
        assert list(hello.gpu_kinds) == ["NVIDIA GPU-1"]
        assert ("torch" in hello.libraries) == (importlib.util.find_spec("torch") is not None)
        assert len(hello.fingerprint) == 64
        assert hello.memory_bytes > 2**30
        assert hello.incarnation
        assert hello.host
        assert hello.pid


async def test_workers_of_a_machine_have_one_fingerprint_computed_once(bench: Any) -> None:
    async with ScriptedControl() as control:
        for name in ("worker-1", "worker-2"):
            await bench.worker(control.address, id=name)
        hellos = [(await control.next_session()).hello for _ in range(2)]
        assert hellos[0].fingerprint == hellos[1].fingerprint
        assert hellos[0].incarnation != hellos[1].incarnation
        assert len(list((bench.folder / "cache").glob("fingerprint-*.json"))) == 1


async def test_training_goes_on_without_control_and_it_is_told_what_is_held(bench: Any) -> None:
    bench.job(shards=4)
    async with ScriptedAggregator() as aggregator:
        bench.own(aggregator)
        async with ScriptedControl(generation=4) as control:
            address = control.address
            await bench.worker(address)
            session = await control.next_session()
            await session.send(4, assign_job=bench.assign([(0, 2)], placement=8))
            stream = await aggregator.next_stream()
            await stream.send_version(0, 0, bench.version(0))
            await session.receive("worker_job_ready")
        # Control is gone; steps go on.
        for version in range(3):
            await stream.send_go(bench.go(version))
            frame, payload = await stream.receive_frame()
            assert frame.step == version
            assert payload == bench.gradient(Node(0, 2), version)[0].tobytes()
            await stream.send_version(version + 1, 0, bench.version(version + 1))
        async with ScriptedControl(generation=5, address=address) as control:
            session = await control.next_session()
            assert session.hello.generation == 4
            (held,) = session.hello.held_jobs
            assert (held.job_id, held.term, held.placement) == (bench.plan.job_id, 1, 8)
            assert held.ready
            assert [(node.first, node.span) for node in held.train_nodes] == [(0, 2)]
            # The placement of the new control applies to the open round.
            await session.send(5, assign_job=bench.assign([(0, 2), (2, 2)], placement=9))
            await stream.send_go(bench.go(3))
            nodes = {(await stream.receive_frame())[0].node.first for _ in range(2)}
            assert nodes == {0, 2}


async def test_failures_wait_for_control(bench: Any) -> None:
    bench.job(shards=2, custom={"row": 1, "act": "raise_error"})
    async with ScriptedAggregator() as aggregator:
        bench.own(aggregator)
        async with ScriptedControl() as control:
            address = control.address
            await bench.worker(address)
            session = await control.next_session()
            await session.send(assign_job=bench.assign([(0, 2)]))
            stream = await aggregator.next_stream()
            await stream.send_version(0, 0, bench.version(0))
            await session.receive("worker_job_ready")
        await stream.send_go(bench.go(0))
        async with ScriptedControl(address=address) as control:
            session = await control.next_session()
            failed = await session.receive("leaf_failed")
            assert (failed.shard, failed.step) == (0, 0)


async def test_a_control_that_starts_anew_hears_of_failures_again(bench: Any) -> None:
    bench.job(shards=2, custom={"row": 1, "act": "raise_error"})
    async with ScriptedAggregator() as aggregator:
        bench.own(aggregator)
        async with ScriptedControl() as control:
            address = control.address
            await bench.worker(address)
            session = await control.next_session()
            await session.send(assign_job=bench.assign([(0, 2)]))
            stream = await aggregator.next_stream()
            await stream.send_version(0, 0, bench.version(0))
            await stream.send_go(bench.go(0))
            await session.receive("leaf_failed")
        async with ScriptedControl(address=address) as control:
            session = await control.next_session()
            assert (await session.receive("leaf_failed")).shard == 0


async def test_a_deposed_control_is_left_for_the_next_address(bench: Any) -> None:
    async with ScriptedControl(generation=3) as new, ScriptedControl(generation=2) as old:
        await bench.worker(new.address, old.address)
        session = await new.next_session()
        session.break_off()
        # Wherever it looks, it ends up with the one that leads.
        session = await new.next_session()
        assert session.hello.generation == 3
        bench.job(shards=2)
        await session.send(2, assign_job=bench.assign([(0, 2)]))
        session = await new.next_session()
        assert not session.hello.held_jobs


async def test_a_job_waits_while_storage_is_away(bench: Any) -> None:
    bench.job(shards=2)
    async with ScriptedControl() as control, ScriptedAggregator() as aggregator:
        bench.own(aggregator)
        bench.storage_up.clear()
        await bench.worker(control.address, leaf_timeout_s=2.0)
        session = await control.next_session()
        await session.send(assign_job=bench.assign([(0, 2)]))
        beats = session.heartbeats
        while session.heartbeats < beats + 60:  # longer than a leaf may take
            await session.receive("heartbeat")
        assert not session.has_received("worker_job_ready")
        bench.storage_up.set()
        stream = await aggregator.next_stream()
        await session.receive("worker_job_ready")
        # Waiting for data is not hanging: the leaf's clock stands still.
        bench.storage_up.clear()
        await stream.send_version(0, 0, bench.version(0))
        await stream.send_go(bench.go(0))
        beats = session.heartbeats
        while session.heartbeats < beats + 60:
            await session.receive("heartbeat")
        assert not session.has_received("leaf_failed")
        bench.storage_up.set()
        frame, payload = await stream.receive_frame()
        assert payload == bench.gradient(Node(0, 2), 0)[0].tobytes()
        assert frame.step == 0


async def test_missing_data_names_the_shard(bench: Any) -> None:
    bench.job(shards=2)
    async with ScriptedControl() as control, ScriptedAggregator() as aggregator:
        bench.own(aggregator)
        await bench.worker(control.address)
        session = await control.next_session()
        await session.send(assign_job=bench.assign([(0, 2)]))
        await session.receive("worker_job_ready")
        for digest, data in list(bench.blobs.items()):
            if data[8:9] == b"{" and b"chunk/1" in data[:200]:
                del bench.blobs[digest]
        stream = await aggregator.next_stream()
        await stream.send_version(0, 0, bench.version(0))
        await stream.send_go(bench.go(0))
        failed = await session.receive("leaf_failed")
        assert failed.kind == failed.KIND_DATA
        assert "no blob" in failed.message


async def test_leaves_fetch_only_the_chunks_that_they_read(bench: Any) -> None:
    bench.job(shards=4)
    async with ScriptedControl() as control, ScriptedAggregator() as aggregator:
        bench.own(aggregator)
        await bench.worker(control.address)
        session = await control.next_session()
        # Shard 3 lies in the second chunk of the training split alone.
        await session.send(assign_job=bench.assign([(3, 1)]))
        stream = await aggregator.next_stream()
        await stream.send_version(0, 0, bench.version(0))
        await stream.send_go(bench.go(0))
        await stream.receive_frame()
        chunks = [d for d in bench.downloads if b"chunk/1" in bench.blobs[d][:200]]
        assert len(chunks) == 1


async def test_several_jobs_share_the_slots(bench: Any) -> None:
    first = bench.job(shards=2)
    async with (
        ScriptedControl() as control,
        ScriptedAggregator() as one,
        ScriptedAggregator() as two,
    ):
        bench.own(one)
        await bench.worker(control.address, slots=1)
        session = await control.next_session()
        await session.send(assign_job=bench.assign([(0, 2)]))
        expected = [bench.gradient(Node(0, 2), version)[0].tobytes() for version in range(3)]
        second = bench.job(shards=2, custom={})
        second.job_id = "job-33333333"
        bench.own(two)
        await session.send(assign_job=bench.assign([(0, 2)]))
        streams = await asyncio.gather(one.next_stream(), two.next_stream())
        assert {stream.hello.job_id for stream in streams} == {first.job_id, second.job_id}

        async def steps(stream: Any, plan: Any) -> list[bytes]:
            payloads = []
            for version in range(3):
                random_values = _version(plan, version)
                await stream.send_version(version, 0, random_values)
                await stream.send_go(bench.go(version))
                payloads.append((await stream.receive_frame())[1])
            return payloads

        results = await asyncio.gather(steps(streams[0], first), steps(streams[1], second))
        assert results[0] == expected
        assert all(len(payload) == 12 for payload in results[1])


def _version(plan: Any, number: int) -> Any:
    import numpy as np

    values = np.random.default_rng(number).standard_normal(plan.layout.element_count)
    return (values * 0.1).astype(np.float32)
