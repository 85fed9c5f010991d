"""Go records that workers carry to the owners of other ranges count as the root sealed them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from phalanx.errors import PermissionDenied
from phalanx.frames import BLOCK_ELEMENTS
from phalanx.given import sealed
from phalanx.reduction import Node
from phalanx.testing.exchange import ExchangeClient
from phalanx.testing.ranges import make_plan
from phalanx.v1.training_pb2 import GivenNodes, GoRecord, TreeNode

KEY = b"k" * 32
ELEMENTS = BLOCK_ELEMENTS


def clients(addresses: list[str]) -> list[ExchangeClient]:
    """Streams of the one worker to the owner of each range."""
    nodes = [TreeNode(first=0, span=1)]
    given = sealed(KEY, GivenNodes(job_id="job-test", term=1, worker_id="w", train_nodes=nodes))
    return [
        ExchangeClient(address, "job-test", 1, {index: ELEMENTS}, worker_id="w", given=given)
        for index, address in enumerate(addresses)
    ]


async def assigned(bench: Any) -> list[str]:
    members = [await bench.aggregator(name) for name in ("a", "b")]
    plan = make_plan(elements=2 * ELEMENTS, ranges=2, shards=1, steps=2)
    await bench.assign(plan, ("a", "b"), seal_key=KEY)
    return [member.address for member in members]


def stop(go: GoRecord) -> None:
    go.action = GoRecord.ACTION_STOP


def later(go: GoRecord) -> None:
    go.round += 1


def unsealed(go: GoRecord) -> None:
    go.ClearField("sealed")


def resealed(go: GoRecord) -> None:
    stop(go)
    go.sealed.record = GoRecord(term=1, action=GoRecord.ACTION_FAIL).SerializeToString()


@pytest.mark.parametrize("forge", [unsealed, resealed])
async def test_a_record_that_the_root_did_not_seal_ends_the_stream_and_changes_nothing(
    bench: Any, forge: Callable[[GoRecord], None]
) -> None:
    zeros = np.zeros(ELEMENTS, "<f4")
    root, other = clients(await assigned(bench))
    async with root:
        go = await root.next_go(GoRecord.ACTION_INITIALISE)
        forged = GoRecord()
        forged.CopyFrom(go)
        forge(forged)
        async with other:
            await other.send_go(forged)
            refused = await other.ended()
        assert isinstance(refused, PermissionDenied)
        assert refused.reason == "NOT_SEALED"
        assert [each.field for each in refused.violations] == ["go_record.sealed"]
        assert "round 0 of version" in refused.message
        async with clients([root.address, other.address])[1] as honest:
            await honest.send_go(go)
            await honest.send_node(go, Node(0, 1), zeros, count=0, range_index=1)
            assert (await honest.whole(0, 1) == zeros).all()


@pytest.mark.parametrize("forge", [stop, later])
async def test_what_the_root_sealed_counts_and_not_what_stands_beside_it(
    bench: Any, forge: Callable[[GoRecord], None]
) -> None:
    zeros = np.zeros(ELEMENTS, "<f4")
    root, other = clients(await assigned(bench))
    async with root, other:
        go = await root.next_go(GoRecord.ACTION_INITIALISE)
        forged = GoRecord()
        forged.CopyFrom(go)
        forge(forged)
        await other.send_go(forged)
        await other.send_node(go, Node(0, 1), zeros, count=0, range_index=1)
        assert (await other.whole(0, 1) == zeros).all()
