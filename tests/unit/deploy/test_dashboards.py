"""Dashboards are what their panels say, and each panel can be understood by itself."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
GRAFANA = ROOT / "deploy" / "grafana"
NAMES = ("cluster", "failures", "job")


def generator():
    spec = importlib.util.spec_from_file_location("make_dashboards", GRAFANA / "make_dashboards.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load(name):
    return json.loads((GRAFANA / "dashboards" / f"{name}.json").read_text())


def test_the_files_are_what_the_script_makes(tmp_path):
    generator().write(tmp_path)
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    there = {path.name: path.read_text() for path in (GRAFANA / "dashboards").iterdir()}
    assert made.keys() == there.keys() == {f"{name}.json" for name in NAMES}
    changed = [name for name in made if made[name] != there[name]]
    assert not changed, "run deploy/grafana/make_dashboards.py and commit what it writes"


@pytest.mark.parametrize("name", NAMES)
def test_every_panel_has_a_title_a_unit_a_description_and_queries(name):
    panels = load(name)["panels"]
    assert len({panel["title"] for panel in panels}) == len(panels) > 15
    for panel in panels:
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        assert panel["targets"], panel["title"]
        assert panel["type"] in ("stat", "timeseries")
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "prometheus"
            assert panel["type"] == "stat" or target["legendFormat"], panel["title"]


@pytest.mark.parametrize("name", NAMES)
def test_panels_fill_rows_and_do_not_overlap(name):
    taken = set()
    for panel in load(name)["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not taken & cells, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells


def test_dashboards_can_be_told_apart_and_find_their_job():
    uids = {load(name)["uid"] for name in NAMES}
    assert uids == {f"phalanx-{name}" for name in NAMES}
    for name in NAMES:
        uses = any("$job_id" in t["expr"] for p in load(name)["panels"] for t in p["targets"])
        variables = [each["name"] for each in load(name)["templating"]["list"]]
        assert variables == (["job_id"] if uses else []), name


def test_grafana_is_told_of_the_data_source_that_the_panels_name():
    text = (GRAFANA / "provisioning" / "datasources" / "prometheus.yml").read_text()
    assert "uid: prometheus" in text
