"""The time line of a failure as the command line tells it, and as metrics count it."""

import json
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

import phalanx
from phalanx.cli.main import run
from phalanx.sdk.values import Event
from phalanx.testing.arena import GUARD_S, Arena, arena, held_job, stopped, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.same_bits]

PHASES = ("suspected", "fenced", "redispatched", "recomputed", "committed")
Cli = Callable[..., str]


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Cli:
    def call(cluster: phalanx.LocalCluster, *arguments: str) -> str:
        capfd.readouterr()
        code = run(["--address", cluster.address, *arguments])
        out, err = capfd.readouterr()
        assert code == 0, err
        return out

    return call


def loss_of(ring: Arena, worker_id: str) -> Event:
    """The event that tells it, as soon as it is there."""

    def told() -> list[Event]:
        return [each for each in ring.events("WORKER_LOST") if each.worker_id == worker_id]

    return wait_until(told, f"the loss of {worker_id}")[0]


def counted(ring: Arena, cause: str) -> dict[str, float]:
    """How often each phase of such recoveries was measured."""
    url = f"http://{ring.cluster.process('control-1').metrics_address}/metrics"
    with urllib.request.urlopen(url, timeout=GUARD_S) as answer:
        text = answer.read().decode()
    return {
        sample.labels["phase"]: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "phalanx_recovery_seconds_count" and sample.labels["cause"] == cause
    }


def lines_of(shown: str) -> list[tuple[float, str]]:
    """The entries of a time line: seconds since it began, and what happened."""
    lines = (line for line in shown.splitlines() if line[9:12] == " s ")
    return [(float(line[:9]), line[12:].split()[0]) for line in lines]


def check_story(ring: Arena, cli: Cli, lost: Event, cause: str, story: tuple[str, ...]) -> None:
    """The events of the incident come in this order, and the phases that they stand for as well."""
    told = json.loads(cli(ring.cluster, "--json", "events", "--incident", lost.incident_id))
    assert (told["member"], told["cause"], told["recovered"]) == (lost.worker_id, cause, True)
    phases = [told[f"{phase}_after_s"] for phase in PHASES if phase != "suspected"]
    if "WORKER_SUSPECTED" in story:
        phases = [told["suspected_after_s"], *phases]
    assert all(seconds is not None for seconds in phases)
    assert phases == sorted(phases)
    events = [each for each in told["events"] if each["type"] in story]
    assert tuple(each["type"] for each in events) == story
    assert {each["incident_id"] for each in events} == {lost.incident_id}

    entries = lines_of(cli(ring.cluster, "events", "--incident", lost.incident_id))
    assert entries[0] == (0.0, "began")
    assert [seconds for seconds, _ in entries] == sorted(seconds for seconds, _ in entries)
    wanted = (*story[:-1], "recomputed", story[-1])
    assert tuple(what for _, what in entries if what in wanted) == wanted
    listed = cli(ring.cluster, "events", "--incidents")
    assert f"{lost.incident_id} " in listed
    measured = {"detect", "redispatch", "recompute", "commit", "total"}
    if "WORKER_SUSPECTED" in story:
        measured.add("suspect")
    found = counted(ring, cause)
    assert {phase for phase, count in found.items() if count} >= measured


def test_a_worker_is_killed(tmp_path: Path, undisturbed_sha256: str, cli: Cli) -> None:
    with arena(tmp_path, 2) as ring:
        job = ring.submit_held(held_job(), workers=2)
        ring.signal("worker-1")
        lost = loss_of(ring, "worker-1")
        ring.gate.release()
        result = job.wait(timeout_s=GUARD_S)
        story = ("WORKER_LOST", "SHARDS_MOVED", "RECOVERED")
        check_story(ring, cli, lost, "worker_lost", story)
    assert result.parameters_sha256 == undisturbed_sha256


def test_a_worker_falls_silent(tmp_path: Path, undisturbed_sha256: str, cli: Cli) -> None:
    with arena(tmp_path, 2) as ring:
        job = ring.submit_held(held_job(), workers=2)
        with stopped(ring.cluster.process("worker-1").pid):
            lost = loss_of(ring, "worker-1")
            ring.gate.release()
            result = job.wait(timeout_s=GUARD_S)
        story = ("WORKER_SUSPECTED", "WORKER_LOST", "SHARDS_MOVED", "RECOVERED")
        check_story(ring, cli, lost, "worker_silent", story)
    assert result.parameters_sha256 == undisturbed_sha256
