"""Writes the dashboards from panels/: ``python deploy/grafana/make_dashboards.py [FOLDER]``.

Each panel is a question of an operator: title, unit, what it says, and its queries. The JSON that
Grafana wants has forty lines for each of them, all alike, so it is made from these and checked in.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

HERE = Path(__file__).parent
SOURCE = {"type": "prometheus", "uid": "prometheus"}
COLUMNS = 24
SIZES = {"stat": (4, 4), "timeseries": (8, 8)}
"""Width and height of each kind of panel."""

Panel = dict[str, Any]


def dashboard(name: str) -> dict[str, Any]:
    """Return the JSON of one dashboard."""
    read = YAML(typ="safe").load(HERE / "panels" / f"{name}.yml")
    text = json.dumps(read["panels"])
    return {
        "uid": f"phalanx-{name}",
        "title": read["title"],
        "tags": ["phalanx"],
        "schemaVersion": 39,
        "version": 1,
        "editable": False,
        "timezone": "browser",
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "links": [{"type": "dashboards", "title": "Phalanx", "tags": ["phalanx"]}],
        "templating": {"list": [_job_variable()] if "$job_id" in text else []},
        "panels": list(_placed(read["panels"])),
    }


def _job_variable() -> dict[str, Any]:
    query = "label_values(phalanx_job_progress_step, job_id)"
    return {
        "name": "job_id",
        "label": "Job",
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": "jobs"},
        "definition": query,
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".+",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
    }


def _placed(panels: list[Panel]) -> Iterator[dict[str, Any]]:
    """Put panels from left to right, row by row; a row has one height."""
    x = y = row = 0
    for number, panel in enumerate(panels, start=1):
        width, height = SIZES[panel.get("kind", "timeseries")]
        if x + width > COLUMNS or (row and height != row):
            x, y = 0, y + row
        yield _panel(number, panel, {"x": x, "y": y, "w": width, "h": height})
        x, row = x + width, height


def _panel(number: int, panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    unit = panel["unit"]
    return {
        "id": number,
        "type": panel.get("kind", "timeseries"),
        "title": panel["title"],
        "description": panel["says"],
        "datasource": SOURCE,
        "gridPos": place,
        "fieldConfig": {
            "defaults": {"unit": unit, "thresholds": _thresholds(panel)}
            | ({"min": 0} if unit != "short" else {}),
            "overrides": [],
        },
        "targets": [
            {"refId": chr(ord("A") + index), "datasource": SOURCE, "expr": query["expr"]}
            | ({"legendFormat": query["legend"]} if "legend" in query else {})
            for index, query in enumerate(panel["queries"])
        ],
    }


def _thresholds(panel: Panel) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    if "red_below" in panel:
        steps = [{"color": "red", "value": None}, {"color": "green", "value": panel["red_below"]}]
    if "red_above" in panel:
        steps.append({"color": "red", "value": panel["red_above"]})
    return {"mode": "absolute", "steps": steps}


def write(folder: Path) -> None:
    """Write all of them."""
    for source in sorted((HERE / "panels").glob("*.yml")):
        text = json.dumps(dashboard(source.stem), indent=2, ensure_ascii=False)
        (folder / f"{source.stem}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if sys.argv[1:] else HERE / "dashboards")
