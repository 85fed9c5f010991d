"""The tables of docs/MONITORING.md are what the processes export, metric by metric."""

import re
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from phalanx.telemetry import metrics

TEXT = (Path(__file__).parents[3] / "docs" / "MONITORING.md").read_text()
ROW = re.compile(r"^\| `(\w+)` \| (\w+) \| (.*?) \| (.*?) \|$", re.MULTILINE)
SECTIONS = {
    "Control": metrics.ControlMetrics,
    "Aggregators": metrics.AggregatorMetrics,
    "Workers": metrics.WorkerMetrics,
    "Storage": metrics.StorageMetrics,
    "Every server": metrics.GrpcServerMetrics,
    "Every process that traces": metrics.TraceMetrics,
}


def documented(title: str) -> list[tuple[str, ...]]:
    section = TEXT.split(f"\n### {title}\n")[1].split("\n### ")[0]
    return [match.groups() for match in ROW.finditer(section)]


def rows(registry: CollectorRegistry) -> list[tuple[str, ...]]:
    found = []
    for family in registry.collect():
        if family.name.startswith(("phalanx_", "grpc_")):
            name = family.name + ("_total" if family.type == "counter" else "")
            collector = registry._names_to_collectors[family.name]
            labels = ", ".join(f"`{label}`" for label in collector._labelnames)  # type: ignore[attr-defined]
            found.append((name, family.type, labels, family.documentation))
    assert found
    return found


@pytest.mark.parametrize("title", SECTIONS)
def test_every_metric_of_a_service_is_in_its_table_as_it_is(title: str) -> None:
    registry = CollectorRegistry(auto_describe=True)
    SECTIONS[title](registry)
    assert documented(title) == rows(registry)


def test_so_is_what_every_process_exports() -> None:
    assert documented("Every process") == rows(metrics.new_registry("worker", "worker-1"))
