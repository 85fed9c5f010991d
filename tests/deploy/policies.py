"""What every manifest of deploy/kubernetes must have; a finding says where something is missing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

Object = dict[str, Any]
Path = tuple[str | int, ...]

COMPONENTS = ("coordinator", "storage", "aggregator", "worker")
WORKLOADS = ("Deployment", "StatefulSet")
#: Where anybody is told without keys whether a process is well: for the kubelet, whom no policy
#: keeps out, and for nobody else.
PROBE_PORT = 9411

#: Below the pod's spec, and what must be there; None stands for anything.
POD_FIELDS: dict[Path, Any] = {
    ("serviceAccountName",): "phalanx",
    ("automountServiceAccountToken",): False,
    ("enableServiceLinks",): False,
    ("terminationGracePeriodSeconds",): None,
    ("securityContext", "runAsNonRoot"): True,
    ("securityContext", "runAsUser"): 10001,
    ("securityContext", "runAsGroup"): 10001,
    ("securityContext", "fsGroup"): 10001,
    ("securityContext", "seccompProfile", "type"): "RuntimeDefault",
}
#: Below each container.
CONTAINER_FIELDS: dict[Path, Any] = {
    ("securityContext", "allowPrivilegeEscalation"): False,
    ("securityContext", "privileged"): False,
    ("securityContext", "readOnlyRootFilesystem"): True,
    ("securityContext", "capabilities", "drop"): ["ALL"],
    ("startupProbe", "grpc", "port"): PROBE_PORT,
    ("startupProbe", "grpc", "service"): "liveness",
    ("livenessProbe", "grpc", "port"): PROBE_PORT,
    ("livenessProbe", "grpc", "service"): "liveness",
    ("readinessProbe", "grpc", "port"): PROBE_PORT,
    ("readinessProbe", "grpc", "service"): "",
    ("resources", "requests", "cpu"): None,
    ("resources", "requests", "memory"): None,
    ("resources", "requests", "ephemeral-storage"): None,
    ("resources", "limits", "cpu"): None,
    ("resources", "limits", "memory"): None,
    ("resources", "limits", "ephemeral-storage"): None,
}
#: Secrets that are mounted, by volume; nobody else has them.
SECRETS = {
    "coordinator": {"keys": "phalanx-control-keys", "tokens": "phalanx-tokens"},
    "storage": {"keys": "phalanx-storage-keys", "tokens": "phalanx-tokens"},
    "aggregator": {"keys": "phalanx-aggregator-keys"},
    "worker": {"keys": "phalanx-worker-keys"},
}
FORBIDDEN = ("hostNetwork", "hostPID", "hostIPC")
NAMESPACE_LABELS = {
    "pod-security.kubernetes.io/enforce": "restricted",
    "pod-security.kubernetes.io/audit": "restricted",
    "pod-security.kubernetes.io/warn": "restricted",
}
MISSING = object()


def at(value: Any, path: Path) -> Any:
    """Return what is at a path, or MISSING."""
    for step in path:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            return MISSING
    return value


def remove(value: Any, path: Path) -> None:
    """Remove what is at a path."""
    for step in path[:-1]:
        value = value[step]
    del value[path[-1]]


def of_kind(objects: Sequence[Object], *kinds: str) -> list[Object]:
    """Return the objects of some kinds."""
    return [each for each in objects if each["kind"] in kinds]


def findings(objects: Sequence[Object]) -> list[str]:
    """Return everything that is not as it must be."""
    found = list(_namespace(objects))
    workloads = of_kind(objects, *WORKLOADS)
    names = sorted(each["metadata"]["name"] for each in workloads)
    if names != sorted(COMPONENTS):
        found.append(f"workloads are {names}")
    for workload in workloads:
        found += [f"{workload['metadata']['name']}: {each}" for each in _workload(workload)]
    found += _disruption_budgets(objects, workloads)
    found += _default_deny(objects)
    found += _probes_for_all(objects)
    found += _insecure(objects)
    found += _back_up(objects)
    return found


def _namespace(objects: Sequence[Object]) -> Iterator[str]:
    (namespace,) = of_kind(objects, "Namespace")
    for label, value in NAMESPACE_LABELS.items():
        if namespace["metadata"].get("labels", {}).get(label) != value:
            yield f"the namespace does not say {label}={value}"
    for each in objects:
        if each is not namespace and each["metadata"].get("namespace") != "phalanx":
            yield f"{each['kind']} {each['metadata']['name']} is in another namespace"


def _workload(workload: Object) -> Iterator[str]:
    pod = workload["spec"]["template"]["spec"]
    labels = workload["spec"]["template"]["metadata"]["labels"]
    if labels != workload["spec"]["selector"]["matchLabels"]:
        yield "the selector does not match the pods"
    for path, wanted in POD_FIELDS.items():
        yield from _field(pod, path, wanted)
    yield from (f"{name} is set" for name in FORBIDDEN if pod.get(name))
    for volume in pod["volumes"]:
        if "hostPath" in volume:
            yield f"volume {volume['name']} is of the host"
        if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
            yield f"volume {volume['name']} has no limit"
    yield from _secrets(workload["metadata"]["name"], pod)
    for container in pod["containers"]:
        for path, wanted in CONTAINER_FIELDS.items():
            yield from _field(container, path, wanted)
        yield from _drain(pod, container)
        if container["image"].rpartition(":")[2] in {container["image"], "latest"}:
            yield "the image has no version"
        if "add" in container.get("securityContext", {}).get("capabilities", {}):
            yield "capabilities are added"


def _secrets(component: str, pod: Object) -> Iterator[str]:
    """Each kind of process has its own keys, and cannot write them."""
    mounted = {each["name"]: each["secret"] for each in pod["volumes"] if "secret" in each}
    if {name: each["secretName"] for name, each in mounted.items()} != SECRETS.get(component):
        yield "the secrets are those of others"
    for name, secret in mounted.items():
        if secret.get("defaultMode") != 0o440:
            yield f"secret {name} can be read by others"
    for container in pod["containers"]:
        for mount in container["volumeMounts"]:
            if mount["name"] in mounted and not mount.get("readOnly"):
                yield f"secret {mount['name']} can be written to"


def _insecure(objects: Sequence[Object]) -> Iterator[str]:
    for each in of_kind(objects, "ConfigMap"):
        if any("INSECURE" in name for name in each["data"]):
            yield f"{each['metadata']['name']}: whoever calls may do anything"


def _field(value: Any, path: Path, wanted: Any) -> Iterator[str]:
    found = at(value, path)
    if found is MISSING or (wanted is not None and found != wanted):
        yield f"{'.'.join(map(str, path))} is not {'there' if wanted is None else wanted}"


def _drain(pod: Object, container: Object) -> Iterator[str]:
    """A worker that leaves in good order needs the time that it is told to take, and some more."""
    for variable in container["env"]:
        if variable["name"] == "PHALANX_WORKER_DRAIN_TIMEOUT_S":
            spare_s = pod.get("terminationGracePeriodSeconds", 0) - int(variable["value"])
            if spare_s < 10:
                yield f"{spare_s} s are left after the drain"
            return
    if container["name"] == "worker":
        yield "how long the drain may take is not said"


def _disruption_budgets(objects: Sequence[Object], workloads: Sequence[Object]) -> Iterator[str]:
    selectors = [
        each["spec"]["selector"]["matchLabels"] for each in of_kind(objects, "PodDisruptionBudget")
    ]
    for workload in workloads:
        labels = workload["spec"]["template"]["metadata"]["labels"]
        if labels not in selectors:
            yield f"{workload['metadata']['name']} has no disruption budget"


def _default_deny(objects: Sequence[Object]) -> Iterator[str]:
    for each in of_kind(objects, "NetworkPolicy"):
        spec = each["spec"]
        names_nobody = spec["podSelector"] == {} and not spec.keys() & {"ingress", "egress"}
        if names_nobody and sorted(spec["policyTypes"]) == ["Egress", "Ingress"]:
            return
    yield "nothing denies what no policy names"


def _probes_for_all(objects: Sequence[Object]) -> Iterator[str]:
    """Neither a service nor a policy leads strangers to the port for probes."""
    for each in of_kind(objects, "Service"):
        for port in each["spec"]["ports"]:
            if port.get("targetPort", port["port"]) in (PROBE_PORT, "probes"):
                yield f"service {each['metadata']['name']} leads to probes"
    for each in of_kind(objects, "NetworkPolicy"):
        for rule in each["spec"].get("ingress", ()):
            # A rule that names no port is about all of them.
            ports = rule.get("ports") or [{}]
            if any(_covers(port) for port in ports):
                yield f"policy {each['metadata']['name']} lets others probe"


def _covers(rule: Object) -> bool:
    port = rule.get("port", PROBE_PORT)
    if "endPort" in rule:
        return bool(port <= PROBE_PORT <= rule["endPort"])
    return port in (PROBE_PORT, "probes")


def _back_up(objects: Sequence[Object]) -> Iterator[str]:
    """Several of a kind are kept apart, as far as there are nodes; two leaders in any case."""
    for workload in of_kind(objects, *WORKLOADS):
        name, spec = workload["metadata"]["name"], workload["spec"]
        if spec.get("replicas", 2) < 2:
            continue
        affinity = at(spec["template"]["spec"], ("affinity", "podAntiAffinity"))
        if affinity is MISSING:
            yield f"{name}: all may be on one node"
        elif name == "coordinator":
            key = ("requiredDuringSchedulingIgnoredDuringExecution", 0, "topologyKey")
            if at(affinity, key) != "kubernetes.io/hostname":
                yield f"{name}: both may be on one node"
