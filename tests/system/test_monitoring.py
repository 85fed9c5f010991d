"""A real Prometheus watches a real cluster through its failures: every query of the dashboards and
every rule is answered with data, no page goes out while all is well, and the right one when not."""

from __future__ import annotations

import contextlib
import json
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from phalanx.testing.arena import Arena, arena, gated_job, send, unhurried_job, wait_until
from tests.system.real_prometheus import Prometheus, prometheus

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

DASHBOARDS = Path(__file__).parents[2] / "deploy" / "grafana" / "dashboards"
LEAF_S = 0.02
ENDLESS = 1_000_000
HEALTHY_EVALUATIONS = 15

CALLS = """
import time


def double(number):
    time.sleep(0.1)  # long enough for Prometheus to see the set of tasks begin and go on
    return 2 * number
"""

SELECTOR = re.compile(r"(?:\b[a-z_]+:)?\b(?:phalanx|grpc_server|up\b)[\w:]*(?:\{[^}]*\})?")


@dataclass
class Story:
    """What happened, and when, by the clock of Prometheus."""

    prometheus: Prometheus
    began_s: float = 0.0
    healthy: tuple[float, float] = (0.0, 0.0)
    ended_s: float = 0.0
    pages: dict[str, set[str]] = field(default_factory=dict)
    """By what was wrong: the pages that went out meanwhile."""


def events(watching: Prometheus, kind: str) -> float:
    """How many events of a type Prometheus has seen, of all leaders."""
    kept = f'sum(max_over_time(phalanx_events_total{{type="{kind}"}}[1h]))'
    return sum(float(each["value"][1]) for each in watching.query(kept))


def killed(ring: Arena, watching: Prometheus, member_id: str, sign: str) -> None:
    """Kill a member; wait until Prometheus has seen the event that comes of it, and recovery."""
    before = {kind: events(watching, kind) for kind in (sign, "RECOVERED")}
    ring.signal(member_id)
    for kind, count in before.items():
        wait_until(lambda: events(watching, kind) > count, f"{kind} after {member_id}")  # noqa: B023


def others(ring: Arena, watching: Prometheus) -> None:
    """Jobs of other kinds, to their ends."""
    verified = gated_job(steps=30, verification={"replicas": 3})
    shared = gated_job(steps=30, all_reduce={})
    calls = {
        "name": "calls",
        "code": {"files": {"calls.py": CALLS}},
        "tasks": {
            "entrypoint": "calls:double",
            "arguments": [{"number": each} for each in range(120)],
        },
    }
    for spec in (verified, shared, calls):
        ring.cluster.submit(spec).wait(timeout_s=90)


@contextlib.contextmanager
def all_stopped(ring: Arena, role: str) -> Iterator[None]:
    """SIGSTOP to all processes of one part of the cluster."""
    pids = [each.pid for each in ring.cluster.processes() if each.role == role]
    try:
        for pid in pids:
            send(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                send(pid, signal.SIGCONT)


def paged(ring: Arena, story: Story, role: str, *alerts: str) -> None:
    """Stop a part of the cluster until alerts fire; note the pages among them, wait for calm."""
    watching = story.prometheus
    with all_stopped(ring, role):
        for alert in alerts:
            wait_until(lambda: alert in watching.firing(), f"{alert} without {role}")  # noqa: B023
        story.pages[role] = watching.firing("page")
    wait_until(lambda: not watching.firing("page"), f"calm after {role}")


def quiet(watching: Prometheus, job_id: str) -> None:
    """Let the healthy cluster be looked at for some evaluations of the rules."""
    rule = f'job_id:phalanx_steps:rate1m{{job_id="{job_id}"}}'

    def evaluated() -> bool:
        found = watching.query(f"count_over_time({rule}[10m])")
        return bool(found) and float(found[0]["value"][1]) >= HEALTHY_EVALUATIONS

    wait_until(evaluated, "some evaluations of the rules")


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    folder = tmp_path_factory.mktemp("monitoring")
    with (
        arena(folder, 3, leaf_s=LEAF_S, controls=2) as ring,
        prometheus(folder / "prometheus", ring.cluster) as watching,
    ):
        story = Story(watching)
        ring.workers_ready()
        first = 'min(up{job=~"phalanx-.+"}) == 1 and phalanx:leaders:sum == 1'
        wait_until(lambda: watching.query(first), "the first scrape of all")
        wait_until(lambda: not watching.firing(), "what was missing before that to be forgotten")
        story.began_s = watching.now_s()
        job = ring.cluster.submit(unhurried_job(ENDLESS))
        others(ring, watching)
        quiet(watching, job.id)
        story.healthy = (story.began_s, watching.now_s())

        queued = ring.cluster.submit({**gated_job(), "resources": {"min_workers": 50}})
        killed(ring, watching, "worker-1", "WORKER_LOST")
        killed(ring, watching, ring.cluster.describe().leader, "CONTROL_TOOK_OVER")
        killed(ring, watching, "aggregator-1", "STEPS_REPLAYED")
        wait_until(lambda: not watching.firing("page"), "calm after the kills")
        paged(ring, story, "storage", "PhalanxStorageAway")
        paged(ring, story, "worker", "PhalanxNoWorkers", "PhalanxJobWaits")
        paged(ring, story, "control", "PhalanxNoLeader")
        queued.cancel()
        job.cancel()
        story.ended_s = watching.now_s()
        yield story


def queries() -> list[tuple[str, str]]:
    """(where, PromQL) of every panel, with what Grafana would put in for its variables."""
    found = []
    for path in sorted(DASHBOARDS.glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                expression = target["expr"].replace("$__rate_interval", "15s")
                found.append(
                    (f"{path.stem}: {panel['title']}", expression.replace("$job_id", ".+"))
                )
    return found


def loaded(watching: Prometheus) -> list[dict[str, Any]]:
    """All rules as Prometheus has them."""
    groups = watching.get("rules")["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_every_query_of_every_dashboard_returns_data(story: Story) -> None:
    empty = [
        f"{where}: {expression}"
        for where, expression in queries()
        if not story.prometheus.query_range(expression, story.began_s, story.ended_s)
    ]
    assert not empty


def test_all_rules_load_and_every_recording_has_data(story: Story) -> None:
    rules = loaded(story.prometheus)
    assert {rule["health"] for rule in rules} == {"ok"}, [
        (rule["name"], rule.get("lastError")) for rule in rules if rule["health"] != "ok"
    ]
    recorded = [rule["name"] for rule in rules if rule["type"] == "recording"]
    empty = [
        name
        for name in recorded
        if not story.prometheus.query_range(name, story.began_s, story.ended_s)
    ]
    assert len(recorded) > 15
    assert not empty


def test_all_that_alerts_look_at_is_there(story: Story) -> None:
    """An alert that is silent has to be silent because of a number, not for want of one."""
    looked_at = {
        (rule["name"], selector)
        for rule in loaded(story.prometheus)
        if rule["type"] == "alerting"
        for selector in SELECTOR.findall(rule["query"])
    }
    assert len(looked_at) > 30
    empty = {
        (name, selector)
        for name, selector in looked_at
        if not story.prometheus.query_range(selector, story.began_s, story.ended_s)
    }
    assert not empty


def test_no_page_goes_out_while_all_is_well(story: Story) -> None:
    assert not story.prometheus.query_range('ALERTS{severity="page"}', *story.healthy)


def test_the_right_page_goes_out_and_no_other(story: Story) -> None:
    assert story.pages == {
        "storage": {"PhalanxStorageAway"},
        "worker": {"PhalanxNoWorkers"},
        "control": {"PhalanxNoLeader"},
    }
