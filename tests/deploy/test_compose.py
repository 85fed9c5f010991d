"""deploy/compose*.yaml: both kinds of compose take them, and services are held in bounds."""

from __future__ import annotations

import json
import re
import subprocess
from typing import Any

import pytest
from google.protobuf.json_format import ParseDict
from ruamel.yaml import YAML

from coordinator.aggregation.config import AggregatorConfig
from coordinator.control.config import ControlConfig
from phalanx.config import ServerConfig, build
from phalanx.testing.datasets import REPOSITORY
from phalanx.v1.job_service_pb2 import SubmitJobRequest
from storage.config import StorageConfig
from tests.deploy.engine import compose_commands
from worker.config import WorkerConfig

DEPLOY = REPOSITORY / "deploy"
FILES = {
    "embedded": ["compose.yaml"],
    "postgres-s3": ["compose.yaml", "compose.postgres-s3.yaml"],
    "gpu": ["compose.yaml", "compose.gpu.yaml"],
}
OWN: dict[str, type[ServerConfig]] = {
    "storage": StorageConfig,
    "coordinator-1": ControlConfig,
    "coordinator-2": ControlConfig,
    "aggregator": AggregatorConfig,
    "worker": WorkerConfig,
}
BOUNDS = ("mem_limit", "cpus", "pids_limit")
ONE_TIME = {"keys", "s3-folder", "bucket"}


def services(name: str) -> dict[str, dict[str, Any]]:
    """The services of one file, with its anchors put in."""
    loaded = YAML(typ="safe", pure=True).load((DEPLOY / name).read_text(encoding="utf-8"))
    found: dict[str, dict[str, Any]] = loaded["services"]
    return found


def everything() -> list[tuple[str, str, dict[str, Any]]]:
    """All services with the file that describes them; what only adds to another one is left out."""
    return [
        (file, name, each)
        for file in FILES["postgres-s3"]
        for name, each in services(file).items()
        if "image" in each
    ]


def identity(value: tuple[str, str, dict[str, Any]]) -> str:
    return value[1]


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("files", FILES)
def test_compose_takes_it(files: str, version: str) -> None:
    command = compose_commands().get(version)
    if command is None:
        pytest.skip(f"compose {version} is not installed")
    named = [part for file in FILES[files] for part in ("--file", str(DEPLOY / file))]
    done = subprocess.run(
        [*command, *named, "--profile", "chaos", "config", "--quiet"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def test_there_is_all_that_a_cluster_needs() -> None:
    found = services("compose.yaml")
    assert found.keys() == {*OWN, "keys", "prometheus", "grafana", "chaos"}
    assert (found["worker"]["scale"], found["aggregator"]["scale"]) == (4, 2)
    assert [name for name, each in found.items() if "profiles" in each] == ["chaos"]


@pytest.mark.parametrize("service", everything(), ids=identity)
def test_each_service_is_held_in_bounds(service: tuple[str, str, dict[str, Any]]) -> None:
    _, name, each = service
    for bound in BOUNDS:
        assert each[bound], f"{name} has no {bound}"
    assert each["read_only"] is True
    assert each["cap_drop"] == ["ALL"]
    assert each["security_opt"] == ["no-new-privileges:true"]
    assert not each.get("privileged")
    assert each["healthcheck"].get("test") or each["healthcheck"]["disable"]
    allowed = {"s3-folder": ["CHOWN"]}
    assert each.get("cap_add", []) == allowed.get(name, [])
    assert each["restart"] == {"chaos": "on-failure"}.get(
        name, "no" if name in ONE_TIME else "unless-stopped"
    )


@pytest.mark.parametrize("service", everything(), ids=identity)
def test_only_this_machine_reaches_what_is_published(
    service: tuple[str, str, dict[str, Any]],
) -> None:
    for port in service[2].get("ports", ()):
        assert port.startswith("127.0.0.1:"), port


def test_only_chaos_may_speak_with_the_engine_and_only_when_asked_for() -> None:
    for _, name, each in everything():
        speaks = any("docker.sock" in volume for volume in each.get("volumes", ()))
        assert speaks == (name == "chaos")
    chaos = services("compose.yaml")["chaos"]
    assert chaos["profiles"] == ["chaos"]
    assert chaos["network_mode"] == "none"


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("files", FILES)
def test_services_understand_their_settings(
    name: str, files: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Variables that nobody reads would be ignored without a word."""
    settings = {"PHALANX_STORAGE_STATE": "/state"}
    for file in FILES[files]:
        settings |= services(file).get(name, {}).get("environment", {})
    settings = {key: without_choice(str(value)) for key, value in settings.items()}
    config = build(OWN[name], {}, settings)
    if isinstance(config, ControlConfig):
        assert config.advertise == f"{name}:7410"
        assert config.storage == ("storage:7420",)
    elif isinstance(config, WorkerConfig | AggregatorConfig):
        assert config.control == ("coordinator-1:7410", "coordinator-2:7410")
        assert config.storage == ("storage:7420",)
    assert config.has_keys
    if isinstance(config, WorkerConfig):
        # Compose kills who takes longer to end.
        grace = services("compose.yaml")["worker"]["stop_grace_period"]
        assert int(grace.removesuffix("s")) >= config.drain_timeout_s + 10


def without_choice(value: str) -> str:
    """Return a value with the defaults of what the environment may choose: ${NAME:-default}."""
    while "${" in value:
        before, _, rest = value.partition("${")
        choice, _, after = rest.partition("}")
        value = before + choice.partition(":-")[2] + after
    return value


def test_the_job_of_the_walk_is_one() -> None:
    request = json.loads((DEPLOY / "job.json").read_text(encoding="utf-8"))
    spec = ParseDict(request, SubmitJobRequest()).spec
    assert (spec.data.name, spec.train.batch_size, spec.train.stop.epochs) == ("fashion", 2048, 200)


def test_people_reach_the_ports_where_a_token_is_enough() -> None:
    for name in ("storage", "coordinator-1", "coordinator-2"):
        each = services("compose.yaml")[name]
        service = OWN[name].service.upper()
        public = each["environment"][f"PHALANX_{service}_PUBLIC_LISTEN"].rpartition(":")[2]
        assert [port.rpartition(":")[2] for port in each["ports"]] == [public]


def test_each_kind_of_process_is_given_its_own_keys_only() -> None:
    found = services("compose.yaml")
    assert not [name for name, each in found.items() if "INSECURE" in str(each)]
    for name, config in OWN.items():
        keys = [each for each in found[name]["volumes"] if each.startswith("keys")]
        assert keys == [f"keys-{config.service}:/etc/phalanx/keys:ro"]
    authority = [name for name, each in found.items() if "keys:/var" in str(each.get("volumes"))]
    assert authority == ["keys"]


def test_what_prometheus_scrapes_is_what_runs_here() -> None:
    """Every target is a service at the port of its image, and every service is a target."""
    text = (DEPLOY / "prometheus/prometheus.yml").read_text(encoding="utf-8")
    targets = set()
    for scraped in YAML(typ="safe", pure=True).load(text)["scrape_configs"]:
        for static in scraped.get("static_configs", ()):
            targets |= {(scraped["job_name"], *each.split(":")) for each in static["targets"]}
        for looked_up in scraped.get("dns_sd_configs", ()):
            port = str(looked_up["port"])
            targets |= {(scraped["job_name"], name, port) for name in looked_up["names"]}
    dockerfile = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    ports = dict(re.findall(r"PHALANX_(\w+)_METRICS_LISTEN=0\.0\.0\.0:(\d+)", dockerfile))
    assert targets == {
        (f"phalanx-{config.service}", name, ports[config.service.upper()])
        for name, config in OWN.items()
    }
    networks = services("compose.yaml")["prometheus"]["networks"]
    assert set(services("compose.yaml")["worker"]["networks"]) <= set(networks)


def test_grafana_finds_prometheus_and_the_dashboards() -> None:
    found = services("compose.yaml")
    folder = DEPLOY / "grafana/provisioning"
    yaml = YAML(typ="safe", pure=True)
    (source,) = yaml.load(folder / "datasources/prometheus.yml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert set(found["grafana"]["networks"]) <= set(found["prometheus"]["networks"])
    (provider,) = yaml.load(folder / "dashboards/phalanx.yml")["providers"]
    mounts = dict(each.split(":")[:2] for each in found["grafana"]["volumes"])
    assert mounts["./grafana/dashboards"] == provider["options"]["path"]
    assert mounts["./grafana/provisioning"] == "/etc/grafana/provisioning"


def test_without_a_named_file_the_whole_of_it_runs() -> None:
    lines = (DEPLOY / ".env").read_text(encoding="utf-8").splitlines()
    settings = dict(line.split("=") for line in lines if not line.startswith("#"))
    assert settings == {"COMPOSE_FILE": ":".join(FILES["postgres-s3"])}


def test_what_is_published_can_be_chosen_apart_from_what_is_listened_on() -> None:
    """Clients are told the port of storage that is published, not the one in the network."""
    told = services("compose.yaml")["coordinator-1"]["environment"]
    published = services("compose.yaml")["storage"]["ports"]
    assert told["PHALANX_CONTROL_PUBLIC_ADDRESS"] == "0.0.0.0:${PHALANX_STORAGE_PORT:-7420}"
    assert published == ["127.0.0.1:${PHALANX_STORAGE_PORT:-7420}:7421"]


def test_workers_with_a_gpu_have_as_many_slots() -> None:
    added, base = services("compose.gpu.yaml")["worker"], services("compose.yaml")["worker"]
    (device,) = added["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert base["environment"]["PHALANX_WORKER_SLOTS"] == "${PHALANX_WORKER_SLOTS:-1}"
