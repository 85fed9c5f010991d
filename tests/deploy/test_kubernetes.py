"""deploy/kubernetes: renders, is what the API takes, and says no to what it must."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest

from coordinator.aggregation.config import AggregatorConfig
from coordinator.control.config import ControlConfig
from phalanx.config import ServerConfig, TokensConfig, build
from phalanx.keys.caller import Service, service_name
from phalanx.rpc.health import LIVENESS, HealthServicer
from phalanx.testing.datasets import REPOSITORY
from storage.config import StorageConfig
from tests.deploy import kustomize, policies
from tests.deploy.custom_resources import SCHEMAS
from tests.deploy.reachability import allowed
from worker.config import WorkerConfig

KUBERNETES = REPOSITORY / "deploy/kubernetes"
OVERLAYS = ("small", "production", "scale-to-zero")
VERSIONS = ("1.29", "1.31", "1.33", "1.35", "1.37")
PORTS = {"coordinator": 7410, "storage": 7420, "aggregator": 7430, "worker": 7440}
#: Where people need a token and no certificate.
PEOPLES_PORTS = {"coordinator": 7411, "storage": 7421}
CONFIGS: dict[str, type[ServerConfig]] = {
    "coordinator": ControlConfig,
    "storage": StorageConfig,
    "aggregator": AggregatorConfig,
    "worker": WorkerConfig,
}
Object = dict[str, Any]


@functools.cache
def _render(overlay: str) -> list[Object]:
    return kustomize.render(KUBERNETES / "overlays" / overlay)


def rendered(overlay: str) -> list[Object]:
    return copy.deepcopy(_render(overlay))


def workload(objects: list[Object], name: str) -> Object:
    (found,) = (
        each
        for each in policies.of_kind(objects, *policies.WORKLOADS)
        if each["metadata"]["name"] == name
    )
    return found


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_it_renders_as_kustomize_renders_it(overlay: str) -> None:
    folder = str(KUBERNETES / "overlays" / overlay)
    if shutil.which("kustomize"):
        command = ["kustomize", "build", folder]
    elif shutil.which("kubectl"):
        command = ["kubectl", "kustomize", folder]
    else:
        pytest.skip("neither kustomize nor kubectl is installed")
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    theirs = {kustomize.key_of(each): each for each in kustomize.load_text(done.stdout)}
    assert {kustomize.key_of(each): each for each in rendered(overlay)} == theirs


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_api_takes_every_object(overlay: str, version: str) -> None:
    for each in rendered(overlay):
        if schema := SCHEMAS.get(each["kind"]):
            jsonschema.validate(each, schema)
        else:
            kubernetes_validate.validate(each, version, strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_workers_get_a_gpu_for_their_slot_with_a_component(tmp_path: Path, overlay: str) -> None:
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [str(KUBERNETES / "overlays" / overlay)],
        "components": [str(KUBERNETES / "components/gpu")],
    }
    (tmp_path / "kustomization.yaml").write_text(json.dumps(kustomization))
    objects = kustomize.render(tmp_path)
    assert policies.findings(objects) == []
    worker = workload(objects, "worker")
    for version in VERSIONS:
        kubernetes_validate.validate(worker, version, strict=True)
    (container,) = worker["spec"]["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == limits["cpu"] == "1", "slots are cores"
    others = [each for each in objects if each is not worker]
    assert "nvidia.com/gpu" not in json.dumps(others)


def test_a_field_that_is_misspelt_would_be_seen() -> None:
    objects = rendered("scale-to-zero")
    worker = workload(objects, "worker")
    worker["spec"]["template"]["spec"]["containers"][0]["readOnlyRootFilesystem"] = True
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(worker, VERSIONS[0], strict=True)
    (scaled,) = policies.of_kind(objects, "ScaledObject")
    scaled["spec"]["minReplicas"] = 0
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(scaled, SCHEMAS["ScaledObject"])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_nothing_is_missing(overlay: str) -> None:
    assert policies.findings(rendered(overlay)) == []


@pytest.mark.parametrize("component", policies.COMPONENTS)
@pytest.mark.parametrize(
    "path",
    [("pod", *each) for each in policies.POD_FIELDS]
    + [("container", *each) for each in policies.CONTAINER_FIELDS],
    ids=".".join,
)
def test_each_field_that_protects_is_missed(component: str, path: tuple[str, ...]) -> None:
    """A policy that finds nothing when its field is gone, or says something else, is none."""
    wanted = {
        **{("pod", *key): value for key, value in policies.POD_FIELDS.items()},
        **{("container", *key): value for key, value in policies.CONTAINER_FIELDS.items()},
    }[path]
    for change in (policies.remove, turn_round):
        if change is turn_round and wanted is None:
            continue
        objects = rendered("production")
        pod = workload(objects, component)["spec"]["template"]["spec"]
        place = pod if path[0] == "pod" else pod["containers"][0]
        change(place, path[1:])
        found = policies.findings(objects)
        assert any(
            each.startswith(f"{component}: {'.'.join(path[1:])} is not") for each in found
        ), found


def turn_round(value: Any, path: tuple[str, ...]) -> None:
    """Say the opposite of what is there."""
    for step in path[:-1]:
        value = value[step]
    old = value[path[-1]]
    value[path[-1]] = not old if isinstance(old, bool) else [] if isinstance(old, list) else 0


def drop(kind: str, name: str) -> Callable[[list[Object]], None]:
    def change(objects: list[Object]) -> None:
        kept = [e for e in objects if (e["kind"], e["metadata"]["name"]) != (kind, name)]
        assert len(kept) == len(objects) - 1
        objects[:] = kept

    return change


def in_pod(component: str, change: Callable[[Object], None]) -> Callable[[list[Object]], None]:
    return lambda objects: change(workload(objects, component)["spec"]["template"]["spec"])


def _metrics_policy(objects: list[Object]) -> Object:
    (found,) = (
        each
        for each in policies.of_kind(objects, "NetworkPolicy")
        if each["metadata"]["name"] == "metrics"
    )
    return found


OTHER_HOLES: dict[str, tuple[Callable[[list[Object]], None], str]] = {
    "default deny": (drop("NetworkPolicy", "default-deny"), "nothing denies"),
    **{
        f"budget of {each}": (drop("PodDisruptionBudget", each), f"{each} has no disruption")
        for each in policies.COMPONENTS
    },
    **{
        label: (
            lambda objects, label=label: policies.remove(
                policies.of_kind(objects, "Namespace")[0], ("metadata", "labels", label)
            ),
            f"does not say {label}",
        )
        for label in policies.NAMESPACE_LABELS
    },
    **{
        name: (in_pod("worker", lambda pod, name=name: pod.update({name: True})), f"{name} is set")
        for name in policies.FORBIDDEN
    },
    "host's folder": (
        in_pod(
            "worker",
            lambda pod: pod["volumes"].append({"name": "all", "hostPath": {"path": "/"}}),
        ),
        "is of the host",
    ),
    "no limit of a volume": (
        in_pod("worker", lambda pod: pod["volumes"][0]["emptyDir"].clear()),
        "has no limit",
    ),
    "capabilities": (
        in_pod(
            "storage",
            lambda pod: pod["containers"][0]["securityContext"]["capabilities"].update(
                add=["SYS_ADMIN"]
            ),
        ),
        "capabilities are added",
    ),
    "latest": (
        in_pod("storage", lambda pod: pod["containers"][0].update(image="phalanx:latest")),
        "no version",
    ),
    "no time to drain": (
        in_pod("worker", lambda pod: pod.update(terminationGracePeriodSeconds=75)),
        "0 s are left after the drain",
    ),
    "leaders together": (
        in_pod("coordinator", lambda pod: pod.pop("affinity")),
        "coordinator: all may be on one node",
    ),
    "leaders perhaps together": (
        in_pod(
            "coordinator",
            lambda pod: pod["affinity"]["podAntiAffinity"].pop(
                "requiredDuringSchedulingIgnoredDuringExecution"
            ),
        ),
        "coordinator: both may be on one node",
    ),
    "keys of others": (
        in_pod(
            "worker",
            lambda pod: pod["volumes"][1]["secret"].update(secretName="phalanx-control-keys"),
        ),
        "worker: the secrets are those of others",
    ),
    "keys for all to read": (
        in_pod("worker", lambda pod: pod["volumes"][1]["secret"].pop("defaultMode")),
        "worker: secret keys can be read by others",
    ),
    "keys to write to": (
        in_pod(
            "storage", lambda pod: pod["containers"][0]["volumeMounts"][1].update(readOnly=False)
        ),
        "storage: secret keys can be written to",
    ),
    **{
        f"probes for {who}": (
            lambda objects, rule=rule: _metrics_policy(objects)["spec"]["ingress"].append(rule),
            "policy metrics lets others probe",
        )
        for who, rule in {
            "all, by name": {"ports": [{"port": "probes"}]},
            "all, by number": {"ports": [{"protocol": "TCP", "port": policies.PROBE_PORT}]},
            "all, in a range": {"ports": [{"protocol": "TCP", "port": 9000, "endPort": 9999}]},
            "all, as all else": {},
            "some, as all else": {"from": [{"podSelector": {}}]},
        }.items()
    },
    "probes of a service": (
        lambda objects: policies.of_kind(objects, "Service")[0]["spec"]["ports"].append(
            {"name": "probes", "port": 80, "targetPort": "probes"}
        ),
        "leads to probes",
    ),
    "no keys": (
        lambda objects: policies.of_kind(objects, "ConfigMap")[0]["data"].update(
            PHALANX_INSECURE="true"
        ),
        "whoever calls may do anything",
    ),
    "another namespace": (
        lambda objects: objects[-1]["metadata"].update(namespace="default"),
        "is in another namespace",
    ),
}


@pytest.mark.parametrize("hole", OTHER_HOLES)
def test_each_other_hole_is_found(hole: str) -> None:
    change, words = OTHER_HOLES[hole]
    objects = copy.deepcopy(rendered("production"))
    change(objects)
    found = policies.findings(objects)
    assert any(words in each for each in found), found


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_call_those_they_need_and_nobody_else(overlay: str) -> None:
    objects = rendered(overlay)
    rules = policies.of_kind(objects, "NetworkPolicy")
    pods = {
        name: {"app.kubernetes.io/name": "phalanx", "app.kubernetes.io/component": name}
        for name in PORTS
    }
    pods |= {"client": {"phalanx.dev/client": "true"}, "stranger": {"app": "stranger"}}
    calls = {
        (caller, called)
        for caller, called in itertools.product(pods, PORTS)
        if allowed(rules, pods[caller], pods[called], PORTS[called])
    }
    assert calls == {
        *((member, "coordinator") for member in ("coordinator", "aggregator", "worker")),
        *((member, "storage") for member in ("coordinator", "aggregator", "worker")),
        ("worker", "aggregator"),
        ("worker", "worker"),
    }
    people = {
        (caller, called)
        for caller, called in itertools.product(pods, PEOPLES_PORTS)
        if allowed(rules, pods[caller], pods[called], PEOPLES_PORTS[called])
    }
    assert people == {("client", "coordinator"), ("client", "storage")}
    for caller, called in itertools.product(pods, PORTS):
        assert not allowed(rules, pods[caller], pods[called], 22)
        # Prometheus is in another namespace.
        assert not allowed(rules, pods[caller], pods[called], "metrics")
        # The kubelet comes from the node, about which policies say nothing.
        assert not allowed(rules, pods[caller], pods[called], "probes")
        assert not allowed(rules, pods[caller], pods[called], policies.PROBE_PORT)


def settings_of(objects: list[Object], component: str) -> dict[str, str]:
    """The variables of a container, with what the cluster would fill in."""
    (container,) = workload(objects, component)["spec"]["template"]["spec"]["containers"]
    maps = {
        each["metadata"]["name"]: each["data"] for each in policies.of_kind(objects, "ConfigMap")
    }
    found: dict[str, str] = {}
    for source in container["envFrom"]:
        if "configMapRef" in source:
            found |= maps[source["configMapRef"]["name"]]
    for each in container["env"]:
        filled = {"limits.cpu": "1", "metadata.name": f"{component}-0"}
        source = each.get("valueFrom", {})
        reference = source.get("fieldRef", {}).get("fieldPath") or source.get(
            "resourceFieldRef", {}
        ).get("resource")
        value = filled[reference] if reference else each["value"]
        found[each["name"]] = re.sub(r"\$\((\w+)\)", lambda match: found[match[1]], value)
    return found


@pytest.mark.parametrize("component", policies.COMPONENTS)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_services_understand_their_settings(overlay: str, component: str) -> None:
    """Names that nobody reads would be ignored without a word."""
    settings = settings_of(rendered(overlay), component)
    # Those of the secret phalanx-back-ends among them.
    given = {"PHALANX_STORAGE_STATE": "/state", "PHALANX_STORAGE_BLOBS": "s3://phalanx/blobs"}
    config = build(CONFIGS[component], {}, {**given, **settings})
    assert config.id == f"{component}-0"
    assert config.has_keys
    assert config.probe_listen == f"0.0.0.0:{policies.PROBE_PORT}"
    mounts = workload(rendered(overlay), component)["spec"]["template"]["spec"]["containers"][0]
    folders = {each["mountPath"] for each in mounts["volumeMounts"]}
    used = [config.tls_ca, config.tls_certificate, config.tls_key, getattr(config, "tokens", None)]
    assert {str(path.parent) for path in used if path is not None} <= folders
    if isinstance(config, TokensConfig):
        assert config.public_listen == f"0.0.0.0:{PEOPLES_PORTS[component]}"
    if isinstance(config, WorkerConfig | AggregatorConfig):
        leaders = 1 if overlay == "small" else 2
        assert config.control == tuple(
            f"coordinator-{index}.coordinator:7410" for index in range(leaders)
        )
        assert config.storage == ("storage:7420",)
    if isinstance(config, ControlConfig):
        assert config.advertise == "coordinator-0.coordinator:7410"
        assert config.storage == ("storage:7420",)
    if isinstance(config, WorkerConfig):
        assert (config.slots, config.drain_timeout_s) == (1, 75.0)
        (cache,) = (
            each["emptyDir"]["sizeLimit"]
            for each in workload(rendered(overlay), "worker")["spec"]["template"]["spec"]["volumes"]
            if each["name"] == "cache"
        )
        assert config.cache_bytes < int(cache.removesuffix("Gi")) * 2**30


def test_leaders_are_as_many_as_members_know() -> None:
    for overlay in OVERLAYS:
        objects = rendered(overlay)
        known = settings_of(objects, "worker")["PHALANX_CONTROL"].split(",")
        assert workload(objects, "coordinator")["spec"]["replicas"] == len(known)


def test_ports_are_those_of_the_image() -> None:
    dockerfile = (REPOSITORY / "deploy/Dockerfile").read_text(encoding="utf-8")
    for component, port in PORTS.items():
        (container,) = workload(rendered("small"), component)["spec"]["template"]["spec"][
            "containers"
        ]
        ports = {each["name"]: each["containerPort"] for each in container["ports"]}
        people = PEOPLES_PORTS.get(component)
        rest = {"metrics": 9410, "probes": policies.PROBE_PORT}
        assert ports == {"grpc": port} | rest | ({"people": people} if people else {})
        service = "CONTROL" if component == "coordinator" else component.upper()
        assert f"PHALANX_{service}_LISTEN=0.0.0.0:{port}" in dockerfile
        assert f"PHALANX_{service}_METRICS_LISTEN=0.0.0.0:9410" in dockerfile
        # Only where there is somebody who asks.
        assert "PROBE_LISTEN" not in dockerfile


async def test_health_knows_the_names_that_probes_ask_for() -> None:
    (named,) = {
        tuple(
            workload(rendered(overlay), component)["spec"]["template"]["spec"]["containers"][0][
                probe
            ]["grpc"]["service"]
            for probe in ("startupProbe", "livenessProbe", "readinessProbe")
        )
        for overlay in OVERLAYS
        for component in policies.COMPONENTS
    }
    assert named == (LIVENESS, LIVENESS, "")
    servicer = HealthServicer([])
    assert [servicer.serving(name) for name in named] == [True, True, False]


def test_the_handbook_makes_every_secret_that_pods_take() -> None:
    text = (REPOSITORY / "docs/DEPLOYMENT.md").read_text(encoding="utf-8")
    made = set(re.findall(r"create secret generic (\S+)", text))
    for objects in map(rendered, OVERLAYS):
        for component in policies.COMPONENTS:
            pod = workload(objects, component)["spec"]["template"]["spec"]
            taken = {each["secret"]["secretName"] for each in pod["volumes"] if "secret" in each}
            sources = pod["containers"][0]["envFrom"]
            taken |= {each["secretRef"]["name"] for each in sources if "secretRef" in each}
            assert taken <= made


def test_certificates_name_their_kind_and_what_people_dial() -> None:
    objects = rendered("production")
    issued = {
        each["spec"]["secretName"]: each["spec"]
        for each in policies.of_kind(objects, "Certificate")
        if not each["spec"].get("isCA")
    }
    services = {each["metadata"]["name"] for each in policies.of_kind(objects, "Service")}
    assert issued.keys() == {each["keys"] for each in policies.SECRETS.values()}
    for component in policies.COMPONENTS:
        spec = issued[policies.SECRETS[component]["keys"]]
        kind = CONFIGS[component].service
        assert spec["dnsNames"][0] == service_name(Service(kind))
        assert {"server auth", "client auth"} <= set(spec["usages"])
        dialled = set(spec["dnsNames"][1:])
        if component in PEOPLES_PORTS:
            assert kind in services
            assert {kind, f"{kind}.phalanx.svc", "localhost"} <= dialled
        else:
            assert not dialled


def test_scraped_pods_have_the_names_that_rules_rely_on() -> None:
    (monitor,) = policies.of_kind(rendered("production"), "PodMonitor")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    for component in policies.COMPONENTS:
        labels = {"__meta_kubernetes_pod_label_app_kubernetes_io_component": component}
        for rule in endpoint["relabelings"]:
            (source,) = rule["sourceLabels"]
            if found := re.fullmatch(rule["regex"], labels[source]):
                value = rule["replacement"].replace("$1", found[1] if found.groups() else "")
                labels[rule["targetLabel"]] = value
        assert labels["job"] == f"phalanx-{CONFIGS[component].service}"


def test_workers_scale_by_cpu_or_to_zero_and_nobody_else_sets_their_number() -> None:
    production, to_zero = rendered("production"), rendered("scale-to-zero")
    for objects in (production, to_zero):
        assert "replicas" not in workload(objects, "worker")["spec"]
    (scaler,) = policies.of_kind(production, "HorizontalPodAutoscaler")
    assert scaler["spec"]["metrics"][0]["resource"]["name"] == "cpu"
    assert scaler["spec"]["minReplicas"] >= 1
    assert not policies.of_kind(to_zero, "HorizontalPodAutoscaler")
    (scaled,) = policies.of_kind(to_zero, "ScaledObject")
    assert scaled["spec"]["minReplicaCount"] == 0
    assert scaled["spec"]["scaleTargetRef"]["name"] == "worker"


def test_no_secret_is_in_any_manifest() -> None:
    for overlay in OVERLAYS:
        text = json.dumps(rendered(overlay))
        assert '"kind": "Secret"' not in text
        assert not re.search(r"PASSWORD=|SECRET_ACCESS_KEY=|://[^/@\"]+:[^/@\"]+@", text)


def test_what_the_renderer_does_not_know_it_refuses(tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").write_text("namePrefix: other-\nresources: []\n")
    with pytest.raises(kustomize.Unknown, match="namePrefix"):
        kustomize.render(tmp_path)
