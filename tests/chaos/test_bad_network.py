"""A bad network between real processes changes no bit, ends nothing early and loses nobody."""

from collections.abc import Callable, Iterator

import pytest

from phalanx.sdk.job import Job
from phalanx.testing.arena import GUARD_S, Gate, add_blobs, gated_job, wait_until
from phalanx.testing.proxied_cluster import ProxiedCluster
from phalanx.testing.tcp_proxy import Direction, Link
from phalanx.v1.cluster_service_pb2 import Worker

pytestmark = [pytest.mark.slow, pytest.mark.same_bits]

SLOW = Link(latency_s=0.01, jitter_s=0.005, bytes_per_s=250_000, slice_bytes=500)
HEARTBEATS = 4


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Gate:
    return Gate(tmp_path_factory.mktemp("gate"))


@pytest.fixture(scope="module")
def running(gate: Gate, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProxiedCluster]:
    folder = tmp_path_factory.mktemp("network")
    # Slow is not dead, also where the machine is slow besides.
    environment = {"PHALANX_TEST_GATE": str(gate.folder), "PHALANX_CONTROL_LEASE_TTL_S": "5"}
    with ProxiedCluster(folder, workers=2, environment=environment) as network:
        try:
            add_blobs(network.cluster)
            yield network
        finally:
            gate.release()


@pytest.fixture
def network(running: ProxiedCluster, gate: Gate) -> Iterator[ProxiedCluster]:
    """The cluster, with both workers there and all links clear before and after."""
    wait_until(
        lambda: [w.state for w in running.cluster.workers()] == [Worker.STATE_READY] * 2,
        "both workers",
    )
    yield running
    gate.release()
    for link in running.links():
        link.heal()


@pytest.fixture
def ends_with_the_same_bits(
    network: ProxiedCluster, undisturbed_sha256: str
) -> Callable[[Job], None]:
    def check(job: Job) -> None:
        result = job.wait(timeout_s=GUARD_S)
        assert result.parameters_sha256 == undisturbed_sha256
        assert (result.examples_lost, result.examples_doubled) == (0, 0)
        assert all(worker.running for worker in network.workers)

    return check


def held_at(network: ProxiedCluster, gate: Gate, step: int) -> Job:
    """A job whose leaves wait when it has committed a step."""
    gate.hold()
    job = network.cluster.submit(gated_job())
    gate.bring_to(job, step)
    assert not job.done, "the job was over before the fault could be injected"
    return job


def lost(network: ProxiedCluster) -> list[str]:
    return [event.worker_id for event in network.cluster.events() if event.type == "WORKER_LOST"]


def wait_for_heartbeats(network: ProxiedCluster) -> None:
    """Wait until control has heard of every worker so often that it would have acted."""
    link = network.control_links[0]
    before = link.passed_bytes(Direction.TO_SERVER)
    passed = [before]

    def enough() -> bool:
        now = link.passed_bytes(Direction.TO_SERVER)
        if now != passed[-1]:
            passed.append(now)
        return len(passed) > HEARTBEATS

    wait_until(enough, "heartbeats")


def test_slow_links_evict_nobody(
    network: ProxiedCluster, ends_with_the_same_bits: Callable[[Job], None]
) -> None:
    for link in network.links():
        link.disturb(both=SLOW)
    before = lost(network)
    ends_with_the_same_bits(network.cluster.submit(gated_job()))
    assert lost(network) == before
    assert network.data_link.passed_bytes(Direction.TO_SERVER) > 60 * 100, "nothing passed it"


def test_a_worker_that_control_does_not_hear_is_replaced_and_comes_back(
    network: ProxiedCluster, gate: Gate, ends_with_the_same_bits: Callable[[Job], None]
) -> None:
    job = held_at(network, gate, 10)
    before = lost(network).count("worker-1")
    network.control_links[0].disturb(to_server=Link(black_hole=True))
    wait_until(lambda: lost(network).count("worker-1") > before, "the lease to run out")
    gate.release()
    ends_with_the_same_bits(job)


def test_a_worker_that_does_not_hear_control_holds_nothing_up(
    network: ProxiedCluster, gate: Gate, ends_with_the_same_bits: Callable[[Job], None]
) -> None:
    job = held_at(network, gate, 10)
    network.control_links[0].disturb(to_client=Link(black_hole=True))
    gate.release()
    ends_with_the_same_bits(job)


@pytest.mark.parametrize("direction", list(Direction))
def test_tensors_that_do_not_arrive_are_no_end_of_the_job(
    network: ProxiedCluster,
    gate: Gate,
    direction: Direction,
    ends_with_the_same_bits: Callable[[Job], None],
) -> None:
    job = held_at(network, gate, 10)
    hole = Link(black_hole=True)
    if direction is Direction.TO_SERVER:
        network.data_link.disturb(to_server=hole)
    else:
        network.data_link.disturb(to_client=hole)
    gate.release()
    wait_for_heartbeats(network)
    assert job.refresh().state == "RUNNING"
    network.data_link.heal()
    ends_with_the_same_bits(job)


def test_storms_of_resets_cost_no_contribution(
    network: ProxiedCluster, gate: Gate, ends_with_the_same_bits: Callable[[Job], None]
) -> None:
    before = sum(link.resets for link in network.links())
    job = held_at(network, gate, 0)
    for step in range(3, 51, 3):
        gate.bring_to(job, step)
        for link in network.links():
            link.reset()
    gate.release()
    ends_with_the_same_bits(job)
    assert sum(link.resets for link in network.links()) - before >= 20


def test_everything_out_of_reach_is_not_the_end_of_the_data(
    network: ProxiedCluster, gate: Gate, ends_with_the_same_bits: Callable[[Job], None]
) -> None:
    """Workers that can reach neither control nor aggregator go on looking, for as long as it takes;
    they neither exit nor report anything as done."""
    job = held_at(network, gate, 10)
    for link in network.links():
        link.refuse()
        link.reset()
    gate.release()
    accepted = [link.accepted for link in network.links()]
    wait_until(
        lambda: all(
            link.accepted >= before + 4
            for link, before in zip(network.links(), accepted, strict=True)
        ),
        "four refused attempts on every link",
    )
    assert all(worker.running for worker in network.workers)
    assert job.refresh().state == "RUNNING"
    for link in network.links():
        link.heal()
    ends_with_the_same_bits(job)
