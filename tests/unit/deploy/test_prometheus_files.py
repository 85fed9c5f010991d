"""What Prometheus is given loads, fires when it should, and is explained to who is woken up."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from ruamel.yaml import YAML

from phalanx.telemetry import metrics

ROOT = Path(__file__).parents[3]
PROMETHEUS = ROOT / "deploy" / "prometheus"
SERVICES = ("storage", "control", "aggregator", "worker")
NAME = re.compile(r"\b(?:phalanx|grpc_server)_\w+")
RECORDED = re.compile(r"\b(?:[a-z_]+:)?phalanx_?[a-z_0-9]*:[a-z0-9_]+(?::[a-z0-9_]+)?")


def read(path):
    return YAML(typ="safe").load(path)


def rules(kind):
    """(name, rule) of all rules of one kind."""
    found = [
        (rule[kind], rule)
        for path in sorted((PROMETHEUS / "rules").glob("*.yml"))
        for group in read(path)["groups"]
        for rule in group["rules"]
        if kind in rule
    ]
    assert found
    return found


def exported():
    """The names of all series that processes show."""
    names = {"phalanx_build_info", "phalanx_process_info"}
    for service in (
        metrics.ControlMetrics,
        metrics.AggregatorMetrics,
        metrics.WorkerMetrics,
        metrics.StorageMetrics,
        metrics.GrpcServerMetrics,
    ):
        registry = CollectorRegistry(auto_describe=True)
        service(registry)
        for family in registry.collect():
            endings = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
            names |= {family.name + end for end in endings.get(family.type, ("",))}
    return names


def queries_of_dashboards():
    for path in sorted((ROOT / "deploy" / "grafana" / "panels").glob("*.yml")):
        for panel in read(path)["panels"]:
            for query in panel["queries"]:
                yield f"{path.stem}: {panel['title']}", query["expr"]


def expressions():
    yield from queries_of_dashboards()
    for kind in ("alert", "record"):
        yield from ((name, rule["expr"]) for name, rule in rules(kind))


def promtool(*arguments):
    if shutil.which("promtool") is None:
        pytest.skip("no promtool here (Debian's package `prometheus` has it)")
    done = subprocess.run(
        ["promtool", *map(str, arguments)], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_takes_the_configuration_and_the_rules():
    promtool("check", "config", PROMETHEUS / "prometheus.yml")
    promtool("check", "rules", *sorted((PROMETHEUS / "rules").glob("*.yml")))


def test_alerts_fire_when_they_should_and_only_then():
    promtool("test", "rules", *sorted((PROMETHEUS / "tests").glob("*.yml")))


def test_every_alert_is_seen_to_fire_by_a_test():
    text = "".join(path.read_text() for path in (PROMETHEUS / "tests").glob("*.yml"))
    for name, rule in rules("alert"):
        severity = rule["labels"]["severity"]
        pattern = rf'alertname="{name}", alertstate="firing", severity="{severity}"'
        assert re.search(pattern, text), name


def test_every_alert_says_how_urgent_it_is_and_where_to_read_on():
    for name, rule in rules("alert"):
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"].keys() == {"summary", "description", "runbook"}
        assert rule["annotations"]["runbook"] == f"docs/OPERATIONS.md#{name.lower()}"


def test_the_handbook_says_of_every_alert_what_to_do_and_of_no_other():
    text = (ROOT / "docs" / "OPERATIONS.md").read_text()
    text = text.split("\n## Alerts\n")[1].split("\n## ")[0]
    sections = dict(re.findall(r"^### (\w+)\n(.*?)(?=^### |\Z)", text, re.DOTALL | re.MULTILINE))
    assert list(sections) == [name for name, _ in rules("alert")]
    for name, section in sections.items():
        meaning, _, action = section.partition("**Do:**")
        assert len(meaning.split()) > 5, name
        assert len(action.split()) > 5, name


def test_expressions_use_what_is_exported_or_recorded():
    known = exported()
    recorded = {name for name, _ in rules("record")}
    used = set()
    for where, expression in expressions():
        for name in RECORDED.findall(expression):
            assert name in recorded, f"{where}: {name}"
            used.add(name)
        rest = RECORDED.sub("", re.sub(r'"[^"]*"', "", expression))
        unknown = set(NAME.findall(rest)) - known
        assert not unknown, f"{where}: {unknown}"
    assert used == recorded, "what is recorded is used somewhere"


def test_every_service_is_scraped_under_the_name_that_rules_rely_on():
    jobs = {each["job_name"] for each in read(PROMETHEUS / "prometheus.yml")["scrape_configs"]}
    assert jobs >= {f"phalanx-{service}" for service in SERVICES}
    for where, expression in expressions():
        for job in re.findall(r'job="([^"]+)"', expression):
            assert job in jobs, where
