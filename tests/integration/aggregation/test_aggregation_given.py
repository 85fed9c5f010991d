"""An aggregator with the key of a term takes what workers show that they were given."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from phalanx.errors import PermissionDenied
from phalanx.frames import encode_request
from phalanx.given import sealed
from phalanx.reduction import Node
from phalanx.testing.exchange import ExchangeClient
from phalanx.testing.ranges import make_plan
from phalanx.v1 import aggregation_service_pb2 as pb
from phalanx.v1.training_pb2 import Given, GivenNodes, GoRecord, TreeNode

KEY = b"k" * 32
ELEMENTS = 16


def given(worker_id: str, *shards: int) -> Given:
    nodes = [TreeNode(first=shard, span=1) for shard in shards]
    shown = sealed(
        KEY, GivenNodes(job_id="job-test", term=1, worker_id=worker_id, train_nodes=nodes)
    )
    assert shown is not None
    return shown


async def assigned(bench: Any) -> str:
    member = await bench.aggregator()
    await bench.assign(make_plan(elements=ELEMENTS, shards=2, steps=2), seal_key=KEY)
    return str(member.address)


def client(address: str, worker_id: str, shown: Given | None) -> ExchangeClient:
    return ExchangeClient(address, "job-test", 1, {0: ELEMENTS}, worker_id=worker_id, given=shown)


async def test_a_stream_is_for_a_worker_that_was_given_the_job(bench: Any) -> None:
    address = await assigned(bench)
    for shown in (None, given("w-2", 0)):
        with pytest.raises(PermissionDenied) as refused:
            async with client(address, "w-1", shown):
                pass
        assert [each.field for each in refused.value.violations] == ["hello.given"]


async def test_frames_of_shards_of_others_end_the_stream_and_change_nothing(bench: Any) -> None:
    address = await assigned(bench)
    zeros, ones = np.zeros(ELEMENTS, "<f4"), np.ones(ELEMENTS, "<f4")
    async with (
        client(address, "w-1", given("w-1", 0)) as own,
        client(address, "w-2", given("w-2", 1)) as other,
    ):
        go = await other.next_go(GoRecord.ACTION_INITIALISE)
        # The host of shard 0 makes the parameters that the job begins with.
        await other.send_node(go, Node(0, 1), ones, count=0)
        refused = await other.ended()
        assert isinstance(refused, PermissionDenied)
        assert [each.field for each in refused.violations] == ["frame.node"]
        await own.send_node(
            await own.next_go(GoRecord.ACTION_INITIALISE), Node(0, 1), zeros, count=0
        )
        assert (await own.whole(0) == zeros).all()
        go = await own.next_go(GoRecord.ACTION_TRAIN)
        await own.send_node(go, Node(0, 1), zeros, count=32)
        more = pb.ExchangeRequestHeader(given=given("w-1", 1))
        await own.send_bytes(encode_request(more))
        await own.send_node(go, Node(1, 1), zeros, count=32)
        assert (await own.whole(1) == zeros).all()
