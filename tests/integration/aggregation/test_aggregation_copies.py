"""Late shards on real aggregators: others are asked for copies, and the bits stay the same."""

from __future__ import annotations

import asyncio

import pytest

from phalanx.frames import BLOCK_ELEMENTS, encode_request
from phalanx.given import sealed
from phalanx.reduction import Node, nodes_of_mask, shards_mask
from phalanx.testing.aggregator_peers import share, streams
from phalanx.testing.ranges import Leaves, make_plan, reference
from phalanx.v1 import coordination_service_pb2 as pb
from phalanx.v1.aggregation_service_pb2 import ExchangeRequestHeader
from phalanx.v1.training_pb2 import GivenNodes, GoRecord, TreeNode

STOPS_AT = 5


async def go_record(own, key):
    """The go record of a round; an order may be here before it."""
    while True:
        for go in own.root.go_records:
            if (go.version, go.round) == key:
                return go
        await asyncio.sleep(0.001)


def given(leaves, number, key):
    """What worker `number` of two shows that it was given: its share of each round."""
    rounds = [
        GoRecord(action=action) for action in (GoRecord.ACTION_INITIALISE, GoRecord.ACTION_TRAIN)
    ]
    nodes = [
        TreeNode(first=node.first, span=node.span)
        for go in rounds
        for node in leaves.division(2, go)[number]
    ]
    worker_id = f"worker-{number}"
    return sealed(
        key, GivenNodes(job_id="job-test", term=1, worker_id=worker_id, train_nodes=nodes)
    )


async def works_and_copies(leaves, addresses, key=b""):
    """Worker 0 of two: does its share and every copy that it is asked for; returns the last go."""
    asked = set()
    own_given = given(leaves, 0, key)
    async with streams(leaves, addresses, 1, "worker-0", takes_copies=True, given=own_given) as own:

        async def copies(client):
            while True:
                order = await client.next_order()
                key = (order.version, order.round)
                asked.update((order.version, node.first, node.span) for node in order.nodes)
                nodes = [Node(node.first, node.span) for node in order.nodes]
                for each in own.all if key else ():
                    # The owner of another range takes the copies as well, and asked for none.
                    shown = ExchangeRequestHeader(given=order.given)
                    await each.send_bytes(encode_request(shown))
                await own.contribute(await go_record(own, key), nodes, copy=True)

        copiers = [asyncio.create_task(copies(client)) for client in own.all]
        try:
            last = await own.work(share(leaves, 0, 2))
            # The root decides the end by itself; the other ranges may still wait for copies of the
            # last step.
            await own.vector(last.version)
            return last, asked
        finally:
            for copier in copiers:
                copier.cancel()
            await asyncio.gather(*copiers, return_exceptions=True)


@pytest.mark.parametrize(
    ("owners", "key"), [(("a",), b""), (("a", "b"), b""), (("a", "b"), b"k" * 32)]
)
async def test_a_worker_that_stops_with_open_streams_is_copied(bench, storage, owners, key):
    """It stays connected, as a stopped process does; nobody else tells that it is gone."""
    elements = 3 * BLOCK_ELEMENTS if len(owners) > 1 else 200
    plan = make_plan(elements=elements, ranges=len(owners), shards=6, steps=12)
    leaves = Leaves(plan)
    members = [await bench.aggregator(name) for name in owners]
    await bench.assign(plan, owners, seal_key=key)
    addresses = [member.address for member in members]
    async with streams(
        leaves, addresses, 1, "worker-1", takes_copies=True, given=given(leaves, 1, key)
    ) as victim:

        def stops(go):
            return go.action == GoRecord.ACTION_TRAIN and go.version == STOPS_AT

        stopped = asyncio.create_task(victim.work(share(leaves, 1, 2), until=stops))
        last, asked = await works_and_copies(leaves, addresses, key)
        await stopped
    assert last.action == GoRecord.ACTION_STOP
    late = shards_mask(leaves.division(2, last)[1], 6)
    for version in range(STOPS_AT, 12):
        nodes = [Node(first, span) for step, first, span in asked if step == version]
        # On a busy machine more may be late than what is missing.
        assert shards_mask(nodes, 6) & late == late, "what is missing is copied, in each step"
    # Each range looks for itself; one that was not the first may tell of the step after.
    tellers = [asyncio.create_task(each.session.receive("copies_started")) for each in members]
    told, _ = await asyncio.wait(tellers, return_when=asyncio.FIRST_COMPLETED)
    started = told.pop().result()
    for teller in tellers:
        teller.cancel()
    await asyncio.gather(*tellers, return_exceptions=True)
    assert (started.worker_id, started.cause) == ("worker-1", "late")
    assert STOPS_AT <= started.step < STOPS_AT + len(owners)
    assert list(started.copied_to) == ["worker-0"]
    assert set(nodes_of_mask(late, 6)) == set(leaves.division(2, last)[1])
    report = await members[0].session.receive("job_report")
    while report.outcome != pb.JobReport.OUTCOME_STOPPED:
        report = await members[0].session.receive("job_report")
    row = await storage.get_job_row("job-test")
    stored = b"".join(
        [
            await storage.get_blob(part.digest, part.parameters_offset, part.parameters_length)
            for part in sorted(row.final_checkpoint.parts, key=lambda part: part.range)
        ]
    )
    assert stored == reference(plan)[12].tobytes()


async def test_while_control_is_away_the_shards_of_the_dead_are_handed_out(bench, control, storage):
    plan = make_plan(elements=200, shards=6, steps=12)
    leaves = Leaves(plan)
    member = await bench.aggregator()
    await bench.assign(plan)
    addresses = [member.address]

    async def dies():
        async with streams(leaves, addresses, 1, "worker-1", takes_copies=True) as own:
            await own.work(share(leaves, 1, 2), until=lambda go: go.version == 1)
            await control.__aexit__(None, None, None)
            # The aggregator has to notice first, else it leaves the dead to control.
            while member.aggregator._session.connected:
                await asyncio.sleep(0.01)

    death = asyncio.create_task(dies())
    last, asked = await works_and_copies(leaves, addresses)
    await death
    assert last.action == GoRecord.ACTION_STOP
    assert {version for version, _, _ in asked} == set(range(1, 12))
