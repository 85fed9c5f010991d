"""The table of all calls: who may make each, and with what in it. What is not here is denied.

A test holds it against the descriptors of all services.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from phalanx.errors import PermissionDenied, Violation
from phalanx.keys.caller import Caller, Role, Service
from phalanx.tasks import journal_stream
from phalanx.v1 import job_spec_pb2
from phalanx.wheels import STREAM as WHEELS

DEFAULT_NAMESPACE = "default"
WHEEL_HOLDER = "code."
"""Those who pin wheels call themselves so."""
TASKS = journal_stream("")
"""Journals of tasks begin with it."""

Check: TypeAlias = Callable[[Caller, Any], None]

_VIEWER, _SUBMITTER, _ADMIN = Role.VIEWER, Role.SUBMITTER, Role.ADMIN
_CONTROL, _AGGREGATOR, _WORKER = Service.CONTROL, Service.AGGREGATOR, Service.WORKER


@dataclass(frozen=True)
class Rule:
    """Who may make a call: people from a role on, and nodes of some services.

    `check` raises where what a caller sends is not for this caller.
    """

    people: Role | None = None
    nodes: frozenset[Service] = frozenset()
    public: bool = False
    check: Check | None = None

    def allows(self, caller: Caller) -> bool:
        """Whether a caller may make the call at all."""
        if self.public or caller.open_cluster:
            return True
        if caller.role is not None:
            return self.people is not None and caller.role >= self.people
        return bool(self.nodes & caller.services)


NO_RULE = Rule()


def rule_of(method: str) -> Rule:
    """Return the rule of a method (`/phalanx.v1.JobService/GetJob`); without one nobody may."""
    return RULES.get(method.lstrip("/"), NO_RULE)


def denied(method: str, caller: Caller) -> PermissionDenied:
    """Return what a caller hears who may not make a call."""
    name = method.rpartition("/")[2]
    if caller.role is None:
        who = f"a certificate of {' and '.join(sorted(caller.services)) or 'nobody'}"
        return PermissionDenied(f"{name} is not for {who}", reason="ROLE_NOT_ALLOWED")
    least = rule_of(method).people
    needs = f"it takes the role {least.name.lower()}" if least else "it is for nodes of the cluster"
    return PermissionDenied(
        f"{caller.name} has the role {caller.role.name.lower()} and may not call {name}: {needs}",
        reason="ROLE_NOT_ALLOWED",
    )


def namespace_of_name(namespace: str, name: str) -> str:
    """Return where `[NAMESPACE/]NAME[@VERSION]` is, if it is said in a namespace."""
    space, slash, _ = name.partition("@")[0].rpartition("/")
    return space if slash else namespace or DEFAULT_NAMESPACE


# What callers may send


def _namespace(caller: Caller, request: Any) -> None:
    caller.check_namespace(request.namespace or DEFAULT_NAMESPACE)


def _name(caller: Caller, request: Any) -> None:
    caller.check_namespace(namespace_of_name(request.namespace, request.name), "name")


def _list_of_jobs(caller: Caller, request: Any) -> None:
    # Without a namespace those of all that are open to the caller are listed.
    if request.namespace:
        caller.check_namespace(request.namespace)


def _submission(caller: Caller, request: Any) -> None:
    _spec(caller, request.spec, request.spec.namespace or DEFAULT_NAMESPACE, "spec")


def _spec(caller: Caller, spec: job_spec_pb2.JobSpec, namespace: str, path: str) -> None:
    """Look at a spec, whose path from the request is given, and at those inside of it."""
    namespace = spec.namespace or namespace
    caller.check_namespace(namespace, f"{path}.namespace")
    for field, name in _references(spec):
        caller.check_namespace(namespace_of_name(namespace, name), f"{path}.{field}")
    for field in _code(spec):
        caller.check_code(f"{path}.{field}")
    if spec.HasField("sweep"):
        _spec(caller, spec.sweep.base, namespace, f"{path}.sweep.base")
        _grid(caller, spec.sweep, f"{path}.sweep.grid")


def _grid(caller: Caller, sweep: job_spec_pb2.Sweep, path: str) -> None:
    """Values that are put into a spec later could say anything there."""
    for name, values in sweep.grid.items():
        parts = name.split(".")
        whole = any(
            value.WhichOneof("kind") in {"struct_value", "list_value"} for value in values.values
        )
        if whole or parts[0] == "code" or parts[-1] in _CODE_NAMES:
            caller.check_code(path)
        if (whole or parts[-1] in _NAMES) and not caller.acts_everywhere:
            raise PermissionDenied(
                f"{path}: {name[:128]!r} may name what is in another namespace; that takes a token "
                "for all namespaces",
                reason="NAMESPACE_NOT_ALLOWED",
            )


def _references(spec: job_spec_pb2.JobSpec) -> Iterator[tuple[str, str]]:
    """Fields that name a data set or a model, which may be one of another namespace."""
    yield "data.name", spec.data.name
    yield "train.start.model", spec.train.start.model
    yield "evaluate.model", spec.evaluate.model
    yield "predict.model", spec.predict.model


_NAMES = frozenset({"namespace", "name", "model", "job"})
"""Last parts of the paths of fields that name something."""


_CODE_NAMES = frozenset({"entrypoint", "module"})
"""Last parts of the paths of fields that name code."""


def _code(spec: job_spec_pb2.JobSpec) -> Iterator[str]:
    """Fields that make workers run what the caller says."""
    if spec.code.files or spec.code.wheels:
        yield "code"
    if spec.tasks.entrypoint:
        yield "tasks.entrypoint"
    if spec.train.model.custom.entrypoint:
        yield "train.model.custom.entrypoint"
    if spec.train.model.torch.module:
        yield "train.model.torch.module"


def check_stream(caller: Caller, stream: str) -> None:
    """Raise PermissionDenied where a caller may not append to a journal: that of control is
    control's, those of tasks are for their owners, that of wheels for people who bring code."""
    if caller.open_cluster or _CONTROL in caller.services:
        return
    if _AGGREGATOR in caller.services and stream.startswith(TASKS):
        return
    if caller.role is not None and stream == WHEELS:
        caller.check_code("stream")
        return
    raise _not_this(caller, f"the journal {stream[:128]!r}", "stream")


def check_append(caller: Caller, request: Any) -> None:
    """Raise PermissionDenied where a caller may not append what is asked for to this journal."""
    check_stream(caller, request.stream)
    if request.owners and not caller.open_cluster and _CONTROL not in caller.services:
        raise _not_this(caller, "who owns the ranges of a job", "owners")


def _read(caller: Caller, request: Any) -> None:
    if caller.open_cluster or _CONTROL in caller.services:
        return
    if _AGGREGATOR in caller.services and request.stream.startswith(TASKS):
        return
    if caller.role is None or request.stream != WHEELS:
        raise _not_this(caller, f"the journal {request.stream[:128]!r}", "stream")


def _pins(caller: Caller, request: Any) -> None:
    if caller.role is not None:
        if not request.holder.startswith(WHEEL_HOLDER):
            raise _not_this(caller, f"what {request.holder[:128]!r} pins", "holder")
        if not all(pin.HasField("blob") for pin in request.pins):
            # It would keep others, of whatever namespace, from deleting them.
            raise _not_this(caller, "a pin of a data set or a model", "pins")
        caller.check_code("holder")
    elif _CONTROL not in caller.services and "/" not in request.holder:
        # An aggregator pins results of tasks, as JOB/ATTEMPT.
        raise _not_this(caller, f"what {request.holder[:128]!r} pins", "holder")


def _checkpoints(caller: Caller, _: Any) -> None:
    # Storage does not know which namespace a job is in.
    _everywhere(caller, "read checkpoints")


def _garbage(caller: Caller, _: Any) -> None:
    # Without a grace period it takes what somebody of another namespace is uploading.
    _everywhere(caller, "collect garbage")


def _drain(caller: Caller, _: Any) -> None:
    _everywhere(caller, "drain workers, which work for all")


def _everywhere(caller: Caller, what: str) -> None:
    if not caller.acts_everywhere:
        raise PermissionDenied(
            f"{caller.name} may not {what}: that takes a token for all namespaces",
            reason="NAMESPACE_NOT_ALLOWED",
        )


def _everything(caller: Caller, _: Any) -> None:
    if not caller.acts_everywhere:
        raise PermissionDenied(
            f"{caller.name} may not read all that is stored: it takes a token for all namespaces",
            reason="NAMESPACE_NOT_ALLOWED",
        )


def _not_this(caller: Caller, what: str, field: str) -> PermissionDenied:
    return PermissionDenied(
        f"{what} is not for {caller.name}",
        reason="NOT_YOURS",
        violations=[Violation(field, "names what is not for this caller")],
    )


def _people(least: Role, check: Check | None = None, *nodes: Service) -> Rule:
    return Rule(least, frozenset(nodes), check=check)


def _nodes(*nodes: Service, check: Check | None = None) -> Rule:
    return Rule(None, frozenset(nodes), check=check)


def _table(service: str, rules: Mapping[str, Rule]) -> dict[str, Rule]:
    return {f"{service}/{method}": rule for method, rule in rules.items()}


_ANY_ROLE = Rule(_VIEWER, frozenset(Service))
_MEMBERS = (_CONTROL, _AGGREGATOR, _WORKER)

RULES: Mapping[str, Rule] = {
    **_table(
        "phalanx.v1.JobService",
        {
            "SubmitJob": _people(_SUBMITTER, _submission),
            "CancelJob": _people(_SUBMITTER),
            "PauseJob": _people(_SUBMITTER),
            "ResumeJob": _people(_SUBMITTER),
            "RetryJob": _people(_SUBMITTER),
            "DeleteJob": _people(_SUBMITTER),
            "GetJob": _people(_VIEWER),
            "ListJobs": _people(_VIEWER, _list_of_jobs),
            "WatchJob": _people(_VIEWER),
            "ReadJobLogs": _people(_VIEWER),
            "ReadTaskResults": _people(_VIEWER),
            "ListJobMetrics": _people(_VIEWER),
        },
    ),
    **_table(
        "phalanx.v1.ClusterService",
        {
            "GetCluster": _people(_VIEWER),
            "ListWorkers": _people(_VIEWER),
            "ListEvents": _people(_VIEWER),
            "DrainWorker": _people(_ADMIN, _drain),
        },
    ),
    **_table(
        "phalanx.v1.DatasetService",
        {
            "CreateDataset": _people(_SUBMITTER, _namespace),
            "DeleteDataset": _people(_SUBMITTER, _name),
            "GetDataset": _people(_VIEWER, _name, _CONTROL),
            "ListDatasets": _people(_VIEWER, _namespace),
        },
    ),
    **_table(
        "phalanx.v1.ModelService",
        {
            "CreateModel": _nodes(_CONTROL),
            "DeleteModel": _people(_SUBMITTER, _name),
            "GetModel": _people(_VIEWER, _name, _CONTROL),
            "ListModels": _people(_VIEWER, _namespace),
        },
    ),
    **_table(
        "phalanx.v1.StorageService",
        {
            "PutBlob": _people(_SUBMITTER, None, *_MEMBERS),
            "GetBlob": _people(_VIEWER, None, *_MEMBERS),
            "CheckBlobs": _people(_VIEWER, None, *_MEMBERS),
            "ComposeBlob": _nodes(_CONTROL),
            "AppendJournal": _people(_SUBMITTER, check_append, _CONTROL),
            # Each of its messages names a stream, and storage checks each.
            "AppendJournals": _nodes(_CONTROL, _AGGREGATOR),
            "ReadJournal": _people(_VIEWER, _read, _CONTROL, _AGGREGATOR),
            "TruncateJournal": _nodes(_CONTROL),
            "DeleteJournal": _nodes(_CONTROL),
            "AcquireLease": _nodes(_CONTROL),
            "RenewLease": _nodes(_CONTROL),
            "ReleaseLease": _nodes(_CONTROL),
            "GetLease": _nodes(_CONTROL),
            "RaiseTerm": _nodes(_CONTROL),
            "GetJobRow": _nodes(_CONTROL),
            "DeleteJobRow": _nodes(_CONTROL),
            "CommitCheckpoint": _nodes(_AGGREGATOR, _WORKER),
            "ListCheckpoints": _people(_VIEWER, _checkpoints, _CONTROL, _AGGREGATOR),
            "SetPins": _people(_SUBMITTER, _pins, _CONTROL, _AGGREGATOR),
            "ListPins": _nodes(_CONTROL),
            "CollectGarbage": _people(_ADMIN, _garbage, _CONTROL),
            "ReadSnapshot": _people(_ADMIN, _everything),
            "Scrub": _people(_ADMIN, _everything),
        },
    ),
    **_table("phalanx.v1.CoordinationService", {"Session": _nodes(_AGGREGATOR, _WORKER)}),
    **_table("phalanx.v1.AggregationService", {"Exchange": _nodes(_WORKER)}),
    **_table("phalanx.v1.TaskService", {"Work": _nodes(_WORKER)}),
    # Whoever asks whether a server lives proves nothing.
    **_table(
        "grpc.health.v1.Health",
        {"Check": Rule(public=True), "Watch": Rule(public=True), "List": NO_RULE},
    ),
    **_table("grpc.reflection.v1alpha.ServerReflection", {"ServerReflectionInfo": _ANY_ROLE}),
}
