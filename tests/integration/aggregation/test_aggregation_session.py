"""What an aggregator says to control and to workers when something is not as usual."""

from __future__ import annotations

import asyncio
import time
import urllib.request

import pytest

from coordinator.aggregation import hosting
from phalanx.errors import Aborted, FailedPrecondition, InvalidArgument, Unavailable
from phalanx.frames import encode_request
from phalanx.reduction import Node
from phalanx.testing.aggregator_peers import AggregatorControl, share, streams
from phalanx.testing.exchange import ExchangeClient
from phalanx.testing.ranges import Leaves, make_plan, reference
from phalanx.v1 import aggregation_service_pb2 as exchange
from phalanx.v1 import coordination_service_pb2 as pb
from phalanx.v1.training_pb2 import GoRecord

PLAN = make_plan(elements=1000, steps=40)
GUARD_S = 30.0


def until_version(version):
    return lambda go: go.version == version


async def test_hello_names_what_workers_and_control_need(bench):
    member = await bench.aggregator("a")
    hello = member.session.hello
    assert (hello.aggregator_id, hello.address) == ("a", member.address)
    assert hello.fingerprint == "fingerprint"
    assert hello.incarnation
    assert hello.pid > 0
    assert list(hello.held_ranges) == []


async def test_a_repeated_assignment_changes_nothing_and_is_answered(bench):
    member = await bench.aggregator()
    await bench.assign(PLAN)
    leaves = Leaves(PLAN)
    async with streams(leaves, [member.address], 1) as worker:
        await worker.work(share(leaves, 0, 1), until_version(3))
        await member.session.send(assign_ranges=bench.assignment(PLAN))
        ready = await member.session.receive("ranges_ready")
        assert ready.version == 3
        assert (await worker.vector(3)).tobytes() == reference(PLAN)[3].tobytes()


async def test_what_is_said_late_of_an_older_term_rolls_nothing_back(bench):
    member = await bench.aggregator()
    await bench.assign(PLAN, term=3)
    leaves = Leaves(PLAN)
    async with streams(leaves, [member.address], 3) as worker:
        go = await worker.work(share(leaves, 0, 1), until_version(3))
        await member.session.send(assign_ranges=bench.assignment(PLAN, term=2))
        await member.session.send(release_ranges=pb.ReleaseRanges(job_id="job-test", term=2))
        await member.session.send(assign_ranges=bench.assignment(PLAN, term=3))
        ready = await member.session.receive("ranges_ready")
        assert (ready.term, ready.version) == (3, 3), "and nothing is said of the older one"
        await worker.contribute(go, [Node(0, 4)])
        await worker.work(share(leaves, 0, 1), until_version(5))
        assert (await worker.vector(5)).tobytes() == reference(PLAN)[5].tobytes()


async def test_what_is_of_another_history_of_storage_is_let_go(bench):
    bench.control.welcome.history = 0
    member = await bench.aggregator()
    await bench.assign(PLAN, term=3)
    leaves = Leaves(PLAN)
    async with streams(leaves, [member.address], 3) as worker:
        await worker.work(share(leaves, 0, 1), until_version(3))
        bench.control.welcome.history = 7
        member.session.break_off()
        member.session = await bench.control.next_session()
        hello = member.session.hello
        assert (hello.history, [held.version for held in hello.held_ranges]) == (0, [3])
        with pytest.raises(Unavailable, match="not held here any more"):
            await worker.work(share(leaves, 0, 1), until_version(4))
    assert member.aggregator.find("job-test") is None
    # Whatever its number, this term is another one.
    await bench.assign(PLAN, term=2)
    member.session.break_off()
    again = await bench.control.next_session()
    assert (again.hello.history, [held.term for held in again.hello.held_ranges]) == (7, [2])


async def test_a_term_that_is_loaded_is_not_given_up_for_an_older_one(bench, monkeypatch):
    member = await bench.aggregator()
    may_load = asyncio.Event()
    known_storage = member.aggregator._known_storage

    async def wait():
        await may_load.wait()
        return await known_storage()

    monkeypatch.setattr(member.aggregator, "_known_storage", wait)
    for term in (2, 3, 3, 2):
        await member.session.send(assign_ranges=bench.assignment(PLAN, term=term))
    await member.session.send(release_ranges=pb.ReleaseRanges(job_id="job-test", term=2))
    async with asyncio.timeout(GUARD_S):
        while member.aggregator._loading.get("job-test", (0,))[0] != 3:
            await asyncio.sleep(0)
        may_load.set()
    ready = await member.session.receive("ranges_ready")
    assert (ready.term, ready.HasField("failure")) == (3, False)
    assert member.aggregator.find("job-test").ranges.term == 3


async def test_training_goes_on_without_control_and_is_adopted(bench):
    member = await bench.aggregator()
    await bench.assign(PLAN)
    leaves = Leaves(PLAN)
    async with streams(leaves, [member.address], 1) as worker:
        go = await worker.work(share(leaves, 0, 1), until_version(2))
        address = bench.control.address
        await bench.control.__aexit__(None, None, None)
        await worker.contribute(go, [Node(0, 4)])
        await worker.work(share(leaves, 0, 1), until_version(6))
        async with AggregatorControl(generation=2, address=address) as control:
            session = await control.next_session()
            (held,) = session.hello.held_ranges
            assert (held.job_id, held.term, list(held.range_indexes)) == ("job-test", 1, [0])
            assert held.version == 6
            assert session.hello.generation == 1
            report = await session.receive("job_report")
            assert report.step == 6
            names = set()
            while (6, "train/loss") not in names:
                points = await session.receive("metric_points")
                names |= {(point.step, point.name) for point in points.points}
            assert {step for step, _ in names} >= set(range(1, 7))


async def test_a_control_of_an_older_generation_is_refused(bench):
    member = await bench.aggregator()
    await member.session.send(generation=5, drain=pb.Drain())
    await member.session.send(generation=4, assign_ranges=bench.assignment(make_plan(elements=10)))
    again = await bench.control.next_session()
    assert again.hello.generation == 5
    assert member.aggregator.find("job-test") is None


async def test_an_unknown_job_is_not_ready_yet(bench):
    member = await bench.aggregator()
    with pytest.raises(Unavailable) as refusal:
        async with streams(Leaves(PLAN), [member.address], 1):
            pass
    assert refusal.value.reason == "RANGES_NOT_READY"
    assert refusal.value.retry_after_s is not None


async def test_terms_fence_streams(bench):
    member = await bench.aggregator()
    await bench.assign(PLAN, term=3)
    with pytest.raises(Aborted) as stale:
        async with streams(Leaves(PLAN), [member.address], 2):
            pass
    assert stale.value.reason == "STALE_TERM"
    assert stale.value.details["current_term"] == "3"
    with pytest.raises(Unavailable):
        async with streams(Leaves(PLAN), [member.address], 4):
            pass


async def test_a_release_of_an_older_term_is_ignored(bench):
    member = await bench.aggregator()
    await bench.assign(PLAN, term=3)
    await member.session.send(release_ranges=pb.ReleaseRanges(job_id="job-test", term=2))
    async with streams(Leaves(PLAN), [member.address], 3) as worker:
        assert (await worker.root.next_go()).action == GoRecord.ACTION_INITIALISE
        await member.session.send(release_ranges=pb.ReleaseRanges(job_id="job-test", term=3))
        assert isinstance(await worker.root.ended(), Unavailable)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"\xff\xff", InvalidArgument),
        (encode_request(exchange.ExchangeRequestHeader(hello=exchange.ExchangeHello())), None),
        (encode_request(exchange.ExchangeRequestHeader()), InvalidArgument),
    ],
)
async def test_nonsense_ends_its_own_stream_and_no_other(bench, data, error):
    member = await bench.aggregator()
    await bench.assign(PLAN)
    leaves = Leaves(PLAN)
    async with (
        streams(leaves, [member.address], 1, "good") as good,
        streams(leaves, [member.address], 1, "bad") as bad,
    ):
        await bad.root.send_bytes(data)
        assert isinstance(await bad.root.ended(), error or InvalidArgument)
        await good.work(share(leaves, 0, 1), until_version(2))
        assert (await good.vector(2)).tobytes() == reference(PLAN)[2].tobytes()


async def test_a_stream_begins_with_its_hello(bench):
    member = await bench.aggregator()
    await bench.assign(PLAN)
    client = ExchangeClient(member.address, "job-test", 1, {0: 1000})
    client._hello = exchange.ExchangeRequestHeader(go_record=GoRecord(term=1))
    with pytest.raises(InvalidArgument, match="hello"):
        await client.open()
    await client.close()


async def test_a_contribution_without_its_go_record_ends_the_stream(bench):
    plan = make_plan(elements=3 * 65_536, ranges=2, steps=4)
    member, other = await bench.aggregator("a"), await bench.aggregator("b")
    await bench.assign(plan, ("a", "b"))
    leaves = Leaves(plan)
    async with streams(leaves, [member.address, other.address], 1) as worker:
        go = await worker.root.next_go()
        await worker.contribute(go, [Node(0, 1)])
        (client,) = worker.others
        error = await client.ended()
        assert isinstance(error, FailedPrecondition)
        assert error.reason == "NO_GO_RECORD"


async def test_metrics_of_a_job_are_served(bench, monkeypatch):
    monkeypatch.setattr(hosting, "REPORT_EVERY_S", 3600.0)  # the end shows what is newest
    plan = make_plan(elements=1000, steps=3)
    member = await bench.aggregator()
    await bench.assign(plan)
    leaves = Leaves(plan)
    began_s = time.time()
    async with streams(leaves, [member.address], 1) as worker:
        await worker.work(share(leaves, 0, 1))
        while (report := await member.session.receive("job_report")).outcome != (
            pb.JobReport.OUTCOME_STOPPED
        ):
            pass
    url = f"http://{member.server.metrics_address}/metrics"
    text = await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=10).read().decode())
    values = dict(
        line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#")
    )
    assert float(values['phalanx_job_step{job_id="job-test"}']) == 3
    assert float(values['phalanx_job_examples_total{job_id="job-test"}']) == 3 * 4 * 8
    assert float(values['phalanx_job_examples_lost_total{job_id="job-test"}']) == 0
    assert float(values['phalanx_job_examples_doubled_total{job_id="job-test"}']) == 0
    assert float(values['phalanx_checkpoint_seconds_count{job_id="job-test"}']) == 1
    durable_s = float(
        values['phalanx_checkpoint_last_success_timestamp_seconds{job_id="job-test"}']
    )
    assert began_s <= durable_s <= time.time()
    assert float(values['phalanx_step_seconds_count{job_id="job-test"}']) == 2, "between 3 commits"
    assert float(values['phalanx_staleness_versions_count{job_id="job-test"}']) == 3
    assert float(values['phalanx_staleness_versions_sum{job_id="job-test"}']) == 0
    loss = 'phalanx_job_metric{job_id="job-test",metric="train/loss"}'
    assert float(values[loss]) == report.metrics["train/loss"]
    received = 'phalanx_wire_bytes_total{direction="in",encoding="raw",job_id="job-test"}'
    assert float(values[received]) > 4 * 1000 * 4
