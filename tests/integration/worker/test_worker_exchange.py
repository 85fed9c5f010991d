"""A worker between a scripted control and scripted aggregators: the right nodes and bits arrive."""

from __future__ import annotations

from typing import Any

import numpy as np

from phalanx.errors import Aborted, Unavailable
from phalanx.reduction import Node
from phalanx.testing.members import ScriptedAggregator, ScriptedControl
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
