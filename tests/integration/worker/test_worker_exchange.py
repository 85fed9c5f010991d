"""A worker between a scripted control and scripted aggregators: the right nodes and bits arrive."""

from __future__ import annotations

from typing import Any

import numpy as np

from phalanx.errors import Aborted, Unavailable
from phalanx.reduction import Node
from phalanx.testing.worker_peers import ScriptedAggregator, ScriptedControl
from phalanx.v1 import training_pb2

GoRecord = training_pb2.GoRecord


async def test_a_step_sends_the_canonical_sum_of_its_node(bench: Any) -> None:
    bench.job(shards=4)
    async with ScriptedControl() as control, ScriptedAggregator() as aggregator:
        bench.own(aggregator)
        await bench.worker(control.address, slots=2)
        session = await control.next_session()
        assert session.hello.slots == 2
        assert session.hello.fingerprint
        await session.send(assign_job=bench.assign([(0, 4)]))
        stream = await aggregator.next_stream()
        await stream.send_version(0, 0, bench.version(0))
        await stream.send_go(bench.go(0))
        ready = await session.receive("worker_job_ready")
        assert (ready.job_id, ready.term) == (bench.plan.job_id, 1)
        for version in range(3):
            frame, payload = await stream.receive_frame()
            expected, count = bench.gradient(Node(0, 4), version)
            assert (frame.node.first, frame.node.span) == (0, 4)
            assert (frame.step, frame.vector, frame.term) == (version, "gradient", 1)
            assert frame.shard_mask == b""
            assert frame.example_count == count
            assert payload == expected.tobytes()
            await stream.send_version(version + 1, 0, bench.version(version + 1))
            await stream.send_go(bench.go(version + 1))


async def test_the_host_of_shard_0_initialises(bench: Any) -> None:
    bench.job(shards=4)
    async with ScriptedControl() as control, ScriptedAggregator() as aggregator:
        bench.own(aggregator)
        await bench.worker(control.address)
        session = await control.next_session()
        await session.send(assign_job=bench.assign([(0, 2)]))
        stream = await aggregator.next_stream()
        await stream.send_go(bench.go(0, GoRecord.ACTION_INITIALISE))
        frame, payload = await stream.receive_frame()
        assert (frame.node.first, frame.node.span, frame.vector) == (0, 1, "parameters")
        model, _ = bench._parts("train")
        assert payload == model.initial_parameters(11).tobytes()


async def test_an_evaluation_sends_sums_and_training_goes_on_at_the_same_version(
    bench: Any,
) -> None:
    bench.job(shards=2)
    async with ScriptedControl() as control, ScriptedAggregator() as aggregator:
        bench.own(aggregator)
        await bench.worker(control.address, slots=2)
        session = await control.next_session()
        await session.send(assign_job=bench.assign([(0, 2)], evaluation=[(0, 2)]))
        stream = await aggregator.next_stream()
        await stream.send_version(0, 0, bench.version(0))
        await stream.send_go(bench.go(0, GoRecord.ACTION_EVALUATE, round=1))
        frame, payload = await stream.receive_frame()
        assert (frame.vector, frame.range, frame.round) == ("evaluation", 0, 1)
        assert frame.element_count == len(bench.plan.evaluation_sums)
        assert frame.example_count == bench.plan.evaluation_rows
        assert payload == bench.evaluation(0).tobytes()
        await stream.send_go(bench.go(0, round=2))
        frame, payload = await stream.receive_frame()
        assert (frame.vector, frame.round) == ("gradient", 2)
        assert payload == bench.gradient(Node(0, 2), 0)[0].tobytes()


async def test_ranges_get_their_parts_and_the_go_record_before_them(bench: Any) -> None:
    # 8 inputs or so times this many hidden units: more than two blocks of 65,536 elements.
    bench.job(shards=3, hidden=16_000)
    async with (
        ScriptedControl() as control,
        ScriptedAggregator((0,)) as root,
        ScriptedAggregator((1,)) as other,
    ):
        bench.own(root, other)
        await bench.worker(control.address, slots=2)
        session = await control.next_session()
        await session.send(assign_job=bench.assign([(0, 4)]))
        streams = [await root.next_stream(), await other.next_stream()]
        expected, count = bench.gradient(Node(0, 4), 0)
        whole = bench.version(0)
        for piece, stream in zip(bench.ranges, streams, strict=True):
            stop = piece.first_element + piece.element_count
            stream.range_elements = piece.element_count
            await stream.send_version(0, piece.index, whole[piece.first_element : stop])
        await streams[0].send_go(bench.go(0))
        header, _ = await streams[1].receive()
        assert header.go_record == bench.go(0)
        for piece, stream in zip(bench.ranges, streams, strict=True):
            stop = piece.first_element + piece.element_count
            frame, vector = await stream.receive_vector(np.float32)
            assert (frame.range, frame.first_element) == (piece.index, 0)
            assert frame.example_count == count
            assert vector.tobytes() == expected[piece.first_element : stop].tobytes()


async def test_no_leaf_runs_before_the_version_is_whole_in_all_ranges(bench: Any) -> None:
    bench.job(shards=2, hidden=16_000)
    async with (
        ScriptedControl() as control,
        ScriptedAggregator((0,)) as root,
        ScriptedAggregator((1,)) as other,
    ):
        bench.own(root, other)
        worker = await bench.worker(control.address)
        session = await control.next_session()
        await session.send(assign_job=bench.assign([(0, 2)]))
        streams = [await root.next_stream(), await other.next_stream()]
        _first, second = bench.ranges
        cut = second.first_element
        # Range 0 is at version 1, range 1 still at version 0.
        await streams[0].send_version(0, 0, bench.version(0)[:cut])
        await streams[0].send_version(1, 0, bench.version(1)[:cut])
        await streams[0].send_go(bench.go(0))
        await streams[0].send_go(bench.go(1))
        await streams[1].send_version(0, 1, bench.version(0)[cut:])
        frame, _ = await streams[0].receive_frame()
        assert frame.step == 0
        await streams[1].send_version(1, 1, bench.version(1)[cut:])
        while frame.step == 0:
            frame, payload = await streams[0].receive_frame()
        expected, _ = bench.gradient(Node(0, 2), 1)
        assert payload == expected[: len(payload) // 4].tobytes()
        assert worker.connected


async def test_a_new_stream_gets_the_open_round_again(bench: Any) -> None:
    bench.job(shards=4)
    async with ScriptedControl() as control, ScriptedAggregator() as aggregator:
        bench.own(aggregator)
        await bench.worker(control.address, slots=2)
        session = await control.next_session()
        await session.send(assign_job=bench.assign([(0, 2), (2, 1)]))
        stream = await aggregator.next_stream()
        await stream.send_version(0, 0, bench.version(0))
        await stream.send_go(bench.go(0))
        before = sorted([(await stream.receive_frame()), (await stream.receive_frame())], key=str)
        stream.break_off(Unavailable("restarting"))
        stream = await aggregator.next_stream()
        after = sorted([(await stream.receive_frame()), (await stream.receive_frame())], key=str)
        assert before == after
        assert {(f.node.first, f.node.span) for f, _ in after} == {(0, 2), (2, 1)}


async def test_ranges_that_are_not_ready_are_asked_again(bench: Any) -> None:
    bench.job(shards=2)
    async with ScriptedControl() as control, ScriptedAggregator() as aggregator:
        bench.own(aggregator)
        aggregator.refusal = Unavailable("not yet", reason="RANGES_NOT_READY")
        await bench.worker(control.address)
        session = await control.next_session()
        await session.send(assign_job=bench.assign([(0, 2)]))
        await session.receive("worker_job_ready")
        aggregator.refusal = None
        stream = await aggregator.next_stream()
        assert stream.hello.worker_id == "worker-1"


async def test_a_placement_change_within_a_round_adds_and_keeps_work(bench: Any) -> None:
    bench.job(shards=4)
    async with ScriptedControl() as control, ScriptedAggregator() as aggregator:
        bench.own(aggregator)
        await bench.worker(control.address)
        session = await control.next_session()
        await session.send(assign_job=bench.assign([(0, 2)]))
        stream = await aggregator.next_stream()
        await stream.send_version(0, 0, bench.version(0))
        await stream.send_go(bench.go(0))
        frame, _ = await stream.receive_frame()
        assert (frame.node.first, frame.node.span) == (0, 2)
        # Another worker died: its node comes on top, in the open round.
        await session.send(assign_job=bench.assign([(0, 2), (2, 2)], placement=2))
        frame, payload = await stream.receive_frame()
        assert (frame.node.first, frame.node.span) == (2, 2)
        assert payload == bench.gradient(Node(2, 2), 0)[0].tobytes()
        # Merged nodes are made of what is there: nothing is computed again.
        await session.send(assign_job=bench.assign([(0, 4)], placement=3))
        frame, payload = await stream.receive_frame()
        assert (frame.node.first, frame.node.span) == (0, 4)
        assert payload == bench.gradient(Node(0, 4), 0)[0].tobytes()
        # An older placement changes nothing any more.
        await session.send(assign_job=bench.assign([(2, 2)], placement=2))
        await stream.send_version(1, 0, bench.version(1))
        await stream.send_go(bench.go(1))
        frame, _ = await stream.receive_frame()
        assert (frame.node.first, frame.node.span, frame.step) == (0, 4, 1)


async def test_a_new_term_starts_over_and_the_old_one_is_silent(bench: Any) -> None:
    bench.job(shards=2)
    async with (
        ScriptedControl() as control,
        ScriptedAggregator() as old,
        ScriptedAggregator() as new,
    ):
        bench.own(old)
        await bench.worker(control.address)
        session = await control.next_session()
        await session.send(assign_job=bench.assign([(0, 2)]))
        stream = await old.next_stream()
        await stream.send_version(7, 0, bench.version(7))
        await stream.send_go(bench.go(7))
        frame, _ = await stream.receive_frame()
        assert (frame.term, frame.step) == (1, 7)
        stream.break_off(Aborted("another term", reason="STALE_TERM"))
        bench.own(new)
        await session.send(assign_job=bench.assign([(0, 2)], term=2, placement=1))
        stream = await new.next_stream()
        assert stream.hello.term == 2
        # Versions go back with a roll-back; what belongs to the old term is ignored.
        await stream.send_version(9, 0, bench.version(9), term=1)
        await stream.send_go(bench.go(9, term=1))
        await stream.send_version(3, 0, bench.version(3))
        await stream.send_go(bench.go(3, term=2))
        frame, payload = await stream.receive_frame()
        assert (frame.term, frame.step) == (2, 3)
        assert payload == bench.gradient(Node(0, 2), 3)[0].tobytes()


async def test_results_of_a_finished_round_are_dropped(bench: Any) -> None:
    bench.job(shards=2)
    async with ScriptedControl() as control, ScriptedAggregator() as aggregator:
        bench.own(aggregator)
        await bench.worker(control.address)
        session = await control.next_session()
        await session.send(assign_job=bench.assign([(0, 2)]))
        stream = await aggregator.next_stream()
        # Go records and versions in a row, as a laggard sees them: only the newest counts.
        for version in range(5):
            await stream.send_version(version, 0, bench.version(version))
            await stream.send_go(bench.go(version))
        frame, payload = await stream.receive_frame()
        while frame.step != 4:
            frame, payload = await stream.receive_frame()
        assert payload == bench.gradient(Node(0, 2), 4)[0].tobytes()
        assert stream.is_silent()


async def test_a_stopped_aggregator_blocks_only_its_own_stream(bench: Any) -> None:
    bench.job(shards=2, hidden=300_000)
    async with (
        ScriptedControl() as control,
        ScriptedAggregator((0,)) as root,
        ScriptedAggregator((1,)) as stopped,
    ):
        bench.own(root, stopped)
        await bench.worker(control.address)
        session = await control.next_session()
        await session.send(assign_job=bench.assign([(0, 2)]))
        streams = [await root.next_stream(), await stopped.next_stream()]
        streams[1].reading.clear()
        cut = bench.ranges[1].first_element
        await streams[0].send_version(0, 0, bench.version(0)[:cut])
        await streams[1].send_version(0, 1, bench.version(0)[cut:])
        await streams[0].send_go(bench.go(0))
        streams[0].range_elements = cut
        _, vector = await streams[0].receive_vector(np.float32)
        assert vector.tobytes() == bench.gradient(Node(0, 2), 0)[0][:cut].tobytes()
        # And the session with control goes on.
        beats = session.heartbeats
        while session.heartbeats < beats + 2:
            await session.receive("heartbeat")


async def test_a_revoked_job_is_let_go(bench: Any, eventually: Any) -> None:
    bench.job(shards=2)
    async with ScriptedControl() as control, ScriptedAggregator() as aggregator:
        bench.own(aggregator)
        await bench.worker(control.address)
        session = await control.next_session()
        await session.send(assign_job=bench.assign([(0, 2)]))
        await aggregator.next_stream()
        await session.receive("worker_job_ready")
        revoke = {"job_id": bench.plan.job_id, "term": 1, "reason": "moved"}
        await session.send(revoke_job=revoke)
        released = await session.receive("worker_job_released")
        assert released.job_id == bench.plan.job_id
        # The same job may come back.
        await session.send(assign_job=bench.assign([(0, 2)], placement=5))
        stream = await aggregator.next_stream()
        await stream.send_version(0, 0, bench.version(0))
        await stream.send_go(bench.go(0))
        _frame, payload = await stream.receive_frame()
        assert payload == bench.gradient(Node(0, 2), 0)[0].tobytes()
