"""A real Prometheus beside a local cluster, with the configuration and the rules of deploy/."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import subprocess
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

import phalanx
from phalanx.local.ports import free_ports
from phalanx.testing.arena import GUARD_S, wait_until

DEPLOYED = Path(__file__).parents[2] / "deploy" / "prometheus"
TARGETS_EVERY_S = 0.2
Series = dict[str, Any]


class Prometheus:
    """Its HTTP API. `target_file` follows the processes of the cluster by their parts in it."""

    def __init__(self, folder: Path, cluster: phalanx.LocalCluster, port: int) -> None:
        self._folder = folder
        self._cluster = cluster
        self._url = f"http://127.0.0.1:{port}/api/v1"
        self._ready = f"http://127.0.0.1:{port}/-/ready"
        self._stop = threading.Event()
        self._shown: dict[str, list[str]] = {}

    def now_s(self) -> float:
        """The time by its own clock."""
        (found,) = self.query("time()")
        return float(found["value"][1])

    def query(self, expression: str) -> list[Series]:
        """What an expression gives now; a scalar is a series without labels."""
        data = self.get("query", query=expression)
        if data["resultType"] == "scalar":
            return [{"metric": {}, "value": data["result"]}]
        return list(data["result"])

    def query_range(self, expression: str, start_s: float, end_s: float) -> list[Series]:
        """The series that an expression gives within a time, and that have a number there."""
        step_s = max(0.5, (end_s - start_s) / 1000)
        data = self.get("query_range", query=expression, start=start_s, end=end_s, step=step_s)
        return [
            series
            for series in data["result"]
            if any(math.isfinite(float(value)) for _, value in series["values"])
        ]

    def firing(self, severity: str = ".+") -> set[str]:
        """Names of the alerts that fire now."""
        found = self.query(f'ALERTS{{alertstate="firing", severity=~"{severity}"}}')
        return {series["metric"]["alertname"] for series in found}

    def get(self, path: str, **arguments: Any) -> Any:
        """One call. What Prometheus does not understand fails the test with its own words."""
        url = f"{self._url}/{path}?{urllib.parse.urlencode(arguments)}"
        try:
            with urllib.request.urlopen(url, timeout=GUARD_S) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{arguments}: {error.read().decode()}") from error

    def ready(self) -> bool:
        """Whether it answers; it says no while it opens its data."""
        with contextlib.suppress(OSError), urllib.request.urlopen(self._ready, timeout=GUARD_S):
            return True
        return False

    def follow(self) -> None:
        """Keep the files with the targets up to date until the end."""
        while not self._stop.wait(TARGETS_EVERY_S):
            self.show_targets()

    def show_targets(self) -> None:
        """Write the files whose processes are others than before."""
        found: dict[str, list[str]] = {}
        for member in self._cluster.processes():
            if member.metrics_address:
                found.setdefault(member.role, []).append(member.metrics_address)
        for role, addresses in found.items():
            if self._shown.get(role) != addresses:
                path = self._folder / "targets" / f"phalanx-{role}.json"
                path.with_suffix(".new").write_text(json.dumps([{"targets": addresses}]))
                path.with_suffix(".new").replace(path)
                self._shown[role] = addresses

    def end(self) -> None:
        """Stop following."""
        self._stop.set()


def settle(folder: Path) -> Path:
    """Copy what is deployed with seconds in place of minutes; return the configuration.

    Targets come from files, where names would have been looked up. Nothing else is changed: names
    of jobs, expressions, labels are those of the files.
    """
    yaml = YAML()
    (folder / "rules").mkdir(parents=True)
    (folder / "targets").mkdir()
    for path in (DEPLOYED / "rules").glob("*.yml"):
        hasty = re.sub(r"^( +for:) .*$", r"\1 1s", path.read_text(), flags=re.MULTILINE)
        (folder / "rules" / path.name).write_text(hasty)
    config = yaml.load(DEPLOYED / "prometheus.yml")
    config["global"] = {
        "scrape_interval": "1s",
        "scrape_timeout": "1s",
        "evaluation_interval": "1s",
    }
    for scrape in config["scrape_configs"]:
        for how in [
            key for key in scrape if key.endswith("_sd_configs") or key == "static_configs"
        ]:
            del scrape[how]
        file = f"targets/{scrape['job_name']}.json"
        scrape["file_sd_configs"] = [{"files": [file], "refresh_interval": "1s"}]
    with (folder / "prometheus.yml").open("w") as file:
        yaml.dump(config, file)
    return folder / "prometheus.yml"


@contextlib.contextmanager
def prometheus(folder: Path, cluster: phalanx.LocalCluster) -> Iterator[Prometheus]:
    """Run one that scrapes a cluster; skips where there is none."""
    binary = shutil.which("prometheus")
    if binary is None:
        pytest.skip("no Prometheus here (Debian's package `prometheus` is one)")
    (port,) = free_ports(1)
    config = settle(folder)
    made = Prometheus(folder, cluster, port)
    made.show_targets()
    command = [
        binary,
        f"--config.file={config}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    following = threading.Thread(target=made.follow)
    following.start()
    try:
        wait_until(lambda: made.ready() or process.poll() is not None, "Prometheus")
        assert process.poll() is None, (folder / "log").read_text()
        yield made
    finally:
        made.end()
        following.join()
        process.terminate()
        process.wait(GUARD_S)
