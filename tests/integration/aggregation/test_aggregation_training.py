"""Jobs on real aggregators: the bits of a plain loop, whoever owns, dies, pauses or restores."""

from __future__ import annotations

import asyncio

import pytest

from phalanx.clients.storage import StorageClient
from phalanx.errors import Aborted, Unavailable
from phalanx.frames import BLOCK_ELEMENTS
from phalanx.reduction import Node
from phalanx.testing.aggregator_peers import share, streams
from phalanx.testing.ranges import ROWS_PER_LEAF, Leaves, make_plan, reference
from phalanx.testing.scraping import scrape, series
from phalanx.v1 import coordination_service_pb2 as pb
from phalanx.v1.training_pb2 import GoRecord

THREE_BLOCKS = 2 * BLOCK_ELEMENTS + 99
FRAMES = 5 * BLOCK_ELEMENTS + 3


async def train(leaves, addresses, term=1, workers=2, until=lambda go: False):
    """Workers that host all shards together work until the end; returns the last go record."""

    async def work(index):
        async with streams(leaves, addresses, term, f"worker-{index}") as own:
            return await own.work(share(leaves, index, workers), until)

    return (await asyncio.gather(*(work(index) for index in range(workers))))[0]


async def final_bytes(storage, job_id="job-test"):
    """The parameters of the final checkpoint, composed of its parts in range order."""
    row = await storage.get_job_row(job_id)
    parts = sorted(row.final_checkpoint.parts, key=lambda part: part.range)
    return b"".join(
        [
            await storage.get_blob(part.digest, part.parameters_offset, part.parameters_length)
            for part in parts
        ]
    )


async def outcome(session, wanted):
    """The first report with this outcome."""
    while True:
        report = await session.receive("job_report")
        if report.outcome == wanted:
            return report


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
async def test_a_job_runs_to_the_bits_of_a_plain_loop(bench, storage, optimizer):
    plan = make_plan(
        elements=FRAMES, steps=4, optimizer=optimizer, evaluation_shards=3, evaluate_every=2
    )
    member = await bench.aggregator()
    await bench.assign(plan)
    go = await train(Leaves(plan), [member.address])
    assert go.action == GoRecord.ACTION_STOP
    report = await outcome(member.session, pb.JobReport.OUTCOME_STOPPED)
    assert (report.step, report.reason, report.checkpoint_step) == (4, "STOP_STEPS", 4)
    assert report.examples == 4 * plan.shards * ROWS_PER_LEAF
    assert (report.examples_lost, report.examples_doubled) == (0, 0)
    assert report.metrics["test/loss"] == pytest.approx(0.1)
    assert await final_bytes(storage) == reference(plan)[4].tobytes()
    points = {(p.step, p.name) for p in (await member.session.receive("metric_points")).points}
    assert (1, "train/loss") in points


@pytest.mark.parametrize("owners", [("a", "b", "a"), ("b", "a", "c")])
async def test_several_aggregators_own_one_job(bench, storage, owners):
    plan = make_plan(elements=THREE_BLOCKS, ranges=3, steps=4, optimizer="momentum")
    members = {name: await bench.aggregator(name) for name in sorted(set(owners))}
    await bench.assign(plan, owners)
    await train(Leaves(plan), [members[name].address for name in owners], workers=3)
    await outcome(members[owners[0]].session, pb.JobReport.OUTCOME_STOPPED)
    assert await final_bytes(storage) == reference(plan)[4].tobytes()


async def test_a_worker_that_dies_in_the_middle_of_a_step_costs_nothing_but_time(bench, storage):
    plan = make_plan(elements=FRAMES, steps=3, shards=4)
    leaves = Leaves(plan)
    member = await bench.aggregator()
    await bench.assign(plan)
    async with streams(leaves, [member.address], 1, "lives") as lives:
        async with streams(leaves, [member.address], 1, "dies") as dies:
            works = asyncio.create_task(
                lives.work(lambda go: leaves.division(2, go)[0], until=lambda go: go.version == 1)
            )
            while (go := await dies.root.next_go()).version < 1:
                await dies.contribute(go, leaves.division(2, go)[1])
            at_death = await works
            # Of its unfinished node it sends the first of two frames.
            await dies.contribute(go, [Node(2, 2)], frames=slice(1))
            await lives.contribute(at_death, [Node(0, 2)])
        assert not lives.root.is_whole(2)
        await lives.contribute(at_death, [Node(3, 1), Node(2, 1)])
        await lives.work(share(leaves, 0, 1))
    await outcome(member.session, pb.JobReport.OUTCOME_STOPPED)
    assert await final_bytes(storage) == reference(plan)[3].tobytes()


async def test_a_stopped_worker_slows_nobody(bench, storage):
    plan = make_plan(elements=FRAMES, steps=30)
    leaves = Leaves(plan)
    member = await bench.aggregator()
    await bench.assign(plan)
    async with streams(leaves, [member.address], 1, "stopped") as stopped:
        stopped.root.reading.clear()
        await train(leaves, [member.address])
        await outcome(member.session, pb.JobReport.OUTCOME_STOPPED)
        stopped.root.reading.set()
        assert (await stopped.vector(30)).tobytes() == reference(plan)[30].tobytes()
    assert await final_bytes(storage) == reference(plan)[30].tobytes()


async def test_pause_and_resume_on_another_aggregator(bench, storage):
    plan = make_plan(elements=THREE_BLOCKS, ranges=2, steps=6, optimizer="adam")
    leaves = Leaves(plan)
    first = await bench.aggregator("a")
    await bench.assign(plan, ("a", "a"))
    await train(leaves, [first.address] * 2, until=lambda go: go.version == 2)
    command = pb.JobCommand(job_id="job-test", term=1, kind=pb.JobCommand.KIND_PAUSE)
    await first.session.send(job_command=command)
    await train(leaves, [first.address] * 2)
    report = await outcome(first.session, pb.JobReport.OUTCOME_PAUSED)
    await first.session.send(release_ranges=pb.ReleaseRanges(job_id="job-test", term=1))
    (saved, *_) = await storage.list_checkpoints("job-test")
    assert saved.step == report.checkpoint_step == report.step
    assert not saved.final

    assert await storage.raise_term("job-test", 1) == 2
    second = await bench.aggregator("b")
    await bench.assign(plan, ("b", "b"), term=2, restore=saved)
    await train(leaves, [second.address] * 2, term=2)
    end = await outcome(second.session, pb.JobReport.OUTCOME_STOPPED)
    assert end.step == 6
    assert end.examples == 6 * plan.shards * ROWS_PER_LEAF
    assert await final_bytes(storage) == reference(plan)[6].tobytes()


async def test_a_lost_aggregator_is_replaced_from_the_last_checkpoint(bench, storage):
    plan = make_plan(
        elements=THREE_BLOCKS, ranges=2, steps=6, optimizer="momentum", checkpoint_every=2
    )
    leaves = Leaves(plan)
    owners = ("a", "b")
    members = [await bench.aggregator(name) for name in owners]
    await bench.assign(plan, owners)
    addresses = [member.address for member in members]
    await train(leaves, addresses, until=lambda go: go.version == 3)
    async with asyncio.timeout(30):
        while not (saved := await storage.list_checkpoints("job-test")):
            await asyncio.sleep(0.01)
    lost = bench.members.pop()
    await lost.stop()

    await storage.raise_term("job-test", 1)
    async with streams(leaves, [addresses[0]] * 2, 1, "old") as old:
        await bench.assign(plan, ("a", "a"), term=2, restore=saved[0], reached_step=3)
        assert (await old.root.ended()).reason == "STALE_TERM"
    await train(leaves, [addresses[0]] * 2, term=2)
    report = await outcome(members[0].session, pb.JobReport.OUTCOME_STOPPED)
    assert report.steps_replayed == 3 - saved[0].step
    shown = await asyncio.to_thread(scrape, members[0].server.metrics_address)
    replayed = series("steps_replayed_total", job_id="job-test")
    assert shown[replayed] == report.steps_replayed > 0
    assert report.since_contribution_s >= report.since_commit_s > 0
    assert await final_bytes(storage) == reference(plan)[6].tobytes()


async def test_a_checkpoint_that_cannot_be_read_is_told(bench, storage):
    plan = make_plan(elements=1000, steps=2, checkpoint_every=1)
    leaves = Leaves(plan)
    member = await bench.aggregator()
    await bench.assign(plan)
    await train(leaves, [member.address])
    await outcome(member.session, pb.JobReport.OUTCOME_STOPPED)
    saved = (await storage.list_checkpoints("job-test"))[0]
    saved.parts[0].digest = "0" * 64
    assignment = bench.assignment(plan, term=2, restore=saved)
    await member.session.send(assign_ranges=assignment)
    failure = (await member.session.receive("ranges_ready")).failure
    assert failure.code
    assert failure.message
    with pytest.raises(Unavailable):
        async with streams(leaves, [member.address], 2):
            pass


async def test_training_goes_on_while_storage_is_away(bench, start_storage):
    plan = make_plan(elements=1000, steps=12, checkpoint_every=1, optimizer="adam")
    service = await start_storage(state="late")
    bench.storage_address = address = service.server.address
    async with StorageClient(address) as storage:
        await storage.raise_term("job-test", 0)
    await service.stop(0)
    member = await bench.aggregator()
    await bench.assign(plan)
    go = await train(Leaves(plan), [member.address])
    assert (go.action, go.version) == (GoRecord.ACTION_STOP, 12)
    away = await member.session.receive("member_event")
    assert (away.type, away.job_id) == ("STORAGE_UNAVAILABLE", "job-test")
    await start_storage(address, "late")
    back = await member.session.receive("member_event")
    assert back.type == "STORAGE_RESTORED", "told once, however often it was tried"
    async with StorageClient(address) as storage:
        await outcome(member.session, pb.JobReport.OUTCOME_STOPPED)
        assert await final_bytes(storage) == reference(plan)[12].tobytes()


async def test_a_fenced_checkpoint_is_given_up(bench, storage):
    plan = make_plan(elements=1000, steps=2)
    member = await bench.aggregator()
    await bench.assign(plan)
    await storage.raise_term("job-test", 1)
    await train(Leaves(plan), [member.address])
    await member.session.send(release_ranges=pb.ReleaseRanges(job_id="job-test", term=1))
    with pytest.raises((Unavailable, Aborted)):
        async with asyncio.timeout(30):
            while True:
                async with streams(Leaves(plan), [member.address], 1):
                    await asyncio.sleep(0.01)
    assert await storage.list_checkpoints("job-test") == []
    assert not (await storage.get_job_row("job-test")).HasField("final_checkpoint")
