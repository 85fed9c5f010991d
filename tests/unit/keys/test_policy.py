"""Every call of every service against every kind of caller."""

import importlib
import pkgutil
from pathlib import Path

import pytest
from google.protobuf import json_format
from google.protobuf.descriptor import MethodDescriptor
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

import phalanx.v1
from phalanx.errors import PermissionDenied
from phalanx.keys.caller import ANYBODY, CODE, NOBODY, Caller, Role, Service
from phalanx.keys.policy import NO_RULE, RULES, check_append, check_stream, denied, rule_of
from phalanx.keys.ties import TIES, node_methods, table
from phalanx.v1 import (
    cluster_service_pb2,
    dataset_service_pb2,
    job_service_pb2,
    model_service_pb2,
    storage_service_pb2,
)
from phalanx.v1.job_spec_pb2 import JobSpec

ROOT = Path(__file__).parents[3]

PEOPLE = {
    role.name.lower(): Caller("ann", role=role, namespaces=frozenset({"default"})) for role in Role
}
NODES = {str(each): Caller(str(each), services=frozenset({each})) for each in Service}
CALLERS = {**PEOPLE, **NODES, "nobody": NOBODY}

# Who may call what, written down once more: whoever adds a method decides here, too.
V, S, A = "viewer submitter admin", "submitter admin", "admin"
EXPECTED = {
    "JobService": {
        "SubmitJob": S,
        "GetJob": V,
        "ListJobs": V,
        "CancelJob": S,
        "PauseJob": S,
        "ResumeJob": S,
        "RetryJob": S,
        "DeleteJob": S,
        "WatchJob": V,
        "ReadJobLogs": V,
        "ReadTaskResults": V,
        "ListJobMetrics": V,
    },
    "ClusterService": {"GetCluster": V, "ListWorkers": V, "DrainWorker": A, "ListEvents": V},
    "CoordinationService": {"Session": "aggregator worker"},
    "AggregationService": {"Exchange": "worker"},
    "TaskService": {"Work": "worker"},
    "DatasetService": {
        "CreateDataset": S,
        "GetDataset": f"{V} control",
        "ListDatasets": V,
        "DeleteDataset": S,
    },
    "ModelService": {
        "CreateModel": "control",
        "GetModel": f"{V} control",
        "ListModels": V,
        "DeleteModel": S,
    },
    "StorageService": {
        "PutBlob": f"{S} control aggregator worker",
        "GetBlob": f"{V} control aggregator worker",
        "CheckBlobs": f"{V} control aggregator worker",
        "ComposeBlob": "control",
        "AppendJournal": f"{S} control",
        "AppendJournals": "control aggregator",
        "ReadJournal": f"{V} control aggregator",
        "TruncateJournal": "control",
        "DeleteJournal": "control",
        "AcquireLease": "control",
        "RenewLease": "control",
        "ReleaseLease": "control",
        "GetLease": "control",
        "RaiseTerm": "control",
        "GetJobRow": "control",
        "CommitCheckpoint": "aggregator worker",
        "ListCheckpoints": f"{V} control aggregator",
        "DeleteJobRow": "control",
        "SetPins": f"{S} control aggregator",
        "ListPins": "control",
        "CollectGarbage": f"{A} control",
        "ReadSnapshot": A,
        "Scrub": A,
    },
    "Health": {
        "Check": " ".join(CALLERS),
        "Watch": " ".join(CALLERS),
        "List": "",
    },
    "ServerReflection": {"ServerReflectionInfo": f"{V} control aggregator worker storage"},
}


def _described() -> dict[str, MethodDescriptor]:
    """All methods of all services that any process of Phalanx serves."""
    modules = [
        importlib.import_module(f"phalanx.v1.{each.name}")
        for each in pkgutil.iter_modules(phalanx.v1.__path__)
        if each.name.endswith("_pb2")
    ]
    files = [each.DESCRIPTOR for each in (*modules, health_pb2, reflection_pb2)]
    return {
        f"{service.full_name}/{method.name}": method
        for file in files
        for service in file.services_by_name.values()
        for method in service.methods
    }


METHODS = _described()


def test_every_method_has_a_rule_and_every_rule_a_method():
    assert len(METHODS) > 45
    assert set(RULES) == set(METHODS)


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("path", METHODS)
def test_who_may_call_what(path, caller):
    method = METHODS[path]
    expected = EXPECTED[method.containing_service.name][method.name].split()
    assert rule_of(f"/{path}").allows(CALLERS[caller]) == (caller in expected)


def test_what_has_no_rule_is_denied_to_all():
    assert rule_of("/phalanx.v1.JobService/Added") is NO_RULE
    for caller in CALLERS.values():
        assert not NO_RULE.allows(caller)
    assert NO_RULE.allows(ANYBODY)


def test_denials_say_who_and_what_is_needed():
    assert "ann has the role viewer and may not call SubmitJob: it takes the role submitter" in str(
        denied("/phalanx.v1.JobService/SubmitJob", PEOPLE["viewer"])
    )
    assert "it is for nodes of the cluster" in str(
        denied("/phalanx.v1.CoordinationService/Session", PEOPLE["admin"])
    )
    assert "SubmitJob is not for a certificate of worker" in str(
        denied("/phalanx.v1.JobService/SubmitJob", NODES["worker"])
    )


# What callers may send

ANN = Caller("ann", role=Role.SUBMITTER, namespaces=frozenset({"vision"}))
CODER = Caller(
    "bob", role=Role.SUBMITTER, namespaces=frozenset({"vision"}), permissions=frozenset({CODE})
)
ADMIN = Caller("eve", role=Role.ADMIN, namespaces=None, permissions=frozenset({CODE}))


def _refused(method, caller, request):
    try:
        check = rule_of(f"/phalanx.v1.{method}").check
        assert check is not None
        check(caller, request)
    except PermissionDenied as error:
        return error.reason
    return ""


def _spec(**fields) -> job_service_pb2.SubmitJobRequest:
    return job_service_pb2.SubmitJobRequest(spec=JobSpec(**{"namespace": "vision", **fields}))


@pytest.mark.parametrize(
    ("method", "request_type"),
    [
        ("DatasetService/CreateDataset", dataset_service_pb2.CreateDatasetRequest),
        ("DatasetService/GetDataset", dataset_service_pb2.GetDatasetRequest),
        ("DatasetService/ListDatasets", dataset_service_pb2.ListDatasetsRequest),
        ("DatasetService/DeleteDataset", dataset_service_pb2.DeleteDatasetRequest),
        ("ModelService/GetModel", model_service_pb2.GetModelRequest),
        ("ModelService/ListModels", model_service_pb2.ListModelsRequest),
        ("ModelService/DeleteModel", model_service_pb2.DeleteModelRequest),
    ],
)
def test_data_and_models_of_other_namespaces_are_closed(method, request_type):
    assert not _refused(method, ANN, request_type(namespace="vision"))
    assert not _refused(method, ADMIN, request_type(namespace="speech"))
    # Without a word the namespace is `default`.
    for namespace in ("", "default", "speech"):
        assert _refused(method, ANN, request_type(namespace=namespace)) == "NAMESPACE_NOT_ALLOWED"


@pytest.mark.parametrize("name", ["speech/letters", "speech/letters@2", "/letters"])
def test_a_name_cannot_lead_into_another_namespace(name):
    for method, request_type in (
        ("DatasetService/GetDataset", dataset_service_pb2.GetDatasetRequest),
        ("ModelService/DeleteModel", model_service_pb2.DeleteModelRequest),
    ):
        request = request_type(namespace="vision", name=name)
        assert _refused(method, ANN, request) == "NAMESPACE_NOT_ALLOWED"


@pytest.mark.parametrize(
    "fields",
    [
        {"namespace": "speech"},
        {"namespace": ""},
        {"data": {"name": "speech/letters"}},
        {"train": {"start": {"model": "speech/letters@1"}}},
        {"evaluate": {"model": "speech/letters"}},
        {"predict": {"model": "speech/letters"}},
        {"sweep": {"base": {"data": {"name": "speech/letters"}}}},
        {"sweep": {"base": {"namespace": "speech"}}},
        {"sweep": {"grid": {"data.name": ["speech/letters"]}}},
        {"sweep": {"grid": {"train.start.model": ["speech/letters"]}}},
    ],
)
def test_a_job_of_or_from_another_namespace_is_refused(fields):
    request = job_service_pb2.SubmitJobRequest()
    json_format.ParseDict({"spec": {"namespace": "vision", **fields}}, request)
    assert _refused("JobService/SubmitJob", ANN, request) == "NAMESPACE_NOT_ALLOWED"
    assert not _refused("JobService/SubmitJob", ADMIN, request)
    assert not _refused("JobService/SubmitJob", ANN, _spec(data={"name": "vision/digits"}))


def test_every_field_of_a_spec_that_names_something_stored_is_looked_at():
    """A new program that names a model must be added to the check."""
    found = {
        f"{program.name}.{field.name}"
        for program in JobSpec.DESCRIPTOR.oneofs_by_name["program"].fields
        for field in program.message_type.fields
        if field.name == "model" and field.message_type is None
    }
    assert found == {"evaluate.model", "predict.model"}


@pytest.mark.parametrize(
    "fields",
    [
        {"code": {"files": {"net.py": "x = 1"}}},
        {"code": {"wheels": ["0" * 64]}},
        {"tasks": {"entrypoint": "os:system"}},
        {"train": {"model": {"custom": {"entrypoint": "os:system"}}}},
        {"train": {"model": {"torch": {"module": "os:system"}}}},
        {"sweep": {"grid": {"train.model.torch.module": ["os:system"]}}},
        {"sweep": {"base": {"tasks": {"entrypoint": "os:system"}}}},
        {"sweep": {"base": {"code": {"files": {"net.py": "x = 1"}}}}},
        {"sweep": {"grid": {"train.model.custom.entrypoint": ["os:system"]}}},
        {"sweep": {"grid": {"train.model": [{"custom": {"entrypoint": "os:system"}}]}}},
    ],
)
def test_code_takes_a_permission_of_its_own(fields):
    request = job_service_pb2.SubmitJobRequest()
    json_format.ParseDict({"spec": {"namespace": "vision", **fields}}, request)
    assert _refused("JobService/SubmitJob", ANN, request) == "CODE_NOT_ALLOWED"
    assert not _refused("JobService/SubmitJob", ADMIN, request)


def test_every_entrypoint_of_a_spec_is_looked_at():
    def entrypoints(message, path=()):
        for field in message.fields:
            if field.name == "entrypoint":
                yield ".".join((*path, field.name))
            elif (inner := field.message_type) is not None and inner.name not in path:
                yield from entrypoints(inner, (*path, inner.name))

    assert set(entrypoints(JobSpec.DESCRIPTOR)) == {
        "Train.Model.Custom.entrypoint",
        "Tasks.entrypoint",
        # A sweep holds the spec of a job.
        "Sweep.JobSpec.Train.Model.Custom.entrypoint",
        "Sweep.JobSpec.Tasks.entrypoint",
    }


def test_journals_belong_to_those_who_write_them():
    append = "StorageService/AppendJournal"

    def to(stream):
        return storage_service_pb2.AppendJournalRequest(stream=stream)

    assert not _refused(append, CODER, to("code"))
    assert _refused(append, ANN, to("code")) == "CODE_NOT_ALLOWED"
    for stream in ("control", "leaders", "tasks/job-1", "events"):
        assert _refused(append, ADMIN, to(stream)) == "NOT_YOURS"
        assert not _refused(append, NODES["control"], to(stream))
    check_stream(NODES["aggregator"], "tasks/job-1")
    for stream in ("control", "code", "tasks"):
        with pytest.raises(PermissionDenied):
            check_stream(NODES["aggregator"], stream)
    read = storage_service_pb2.ReadJournalRequest
    assert _refused("StorageService/ReadJournal", ADMIN, read(stream="control")) == "NOT_YOURS"
    assert not _refused("StorageService/ReadJournal", ANN, read(stream="code"))


def test_pins_belong_to_those_who_set_them():
    def of(holder):
        return storage_service_pb2.SetPinsRequest(holder=holder)

    pins = "StorageService/SetPins"
    assert not _refused(pins, CODER, of("code.0123"))
    assert _refused(pins, ANN, of("code.0123")) == "CODE_NOT_ALLOWED"
    assert _refused(pins, ADMIN, of("job-1")) == "NOT_YOURS"
    assert not _refused(pins, NODES["aggregator"], of("job-1/7"))
    assert _refused(pins, NODES["aggregator"], of("job-1")) == "NOT_YOURS"
    assert not _refused(pins, NODES["control"], of("job-1"))


def test_people_pin_wheels_and_nothing_that_others_could_not_delete_then():
    def of(**pin):
        pins = [storage_service_pb2.Pin(blob="0" * 64), storage_service_pb2.Pin(**pin)]
        return storage_service_pb2.SetPinsRequest(holder="code.0123", pins=pins)

    version = {"namespace": "speech", "name": "letters", "version": 1}
    for what in ("dataset", "model"):
        for caller in (CODER, ADMIN):
            assert _refused("StorageService/SetPins", caller, of(**{what: version})) == "NOT_YOURS"
    assert not _refused("StorageService/SetPins", CODER, of(blob="1" * 64))


def test_an_aggregator_reads_journals_of_tasks_only():
    read = storage_service_pb2.ReadJournalRequest
    assert not _refused("StorageService/ReadJournal", NODES["aggregator"], read(stream="tasks/j-1"))
    for stream in ("control", "leaders", "events", "logs/j-1", "code"):
        request = read(stream=stream)
        assert _refused("StorageService/ReadJournal", NODES["aggregator"], request) == "NOT_YOURS"
        assert not _refused("StorageService/ReadJournal", NODES["control"], request)
        assert not _refused("StorageService/ReadJournal", ANYBODY, request)


def test_what_concerns_all_namespaces_takes_an_administrator_of_all():
    one = Caller("mia", role=Role.ADMIN, namespaces=frozenset({"vision"}))
    for method, request in (
        ("StorageService/CollectGarbage", storage_service_pb2.CollectGarbageRequest()),
        ("ClusterService/DrainWorker", cluster_service_pb2.DrainWorkerRequest(worker_id="w-1")),
    ):
        assert _refused(method, one, request) == "NAMESPACE_NOT_ALLOWED"
        assert not _refused(method, ADMIN, request)
    collect = storage_service_pb2.CollectGarbageRequest()
    assert not _refused("StorageService/CollectGarbage", NODES["control"], collect)


def test_checkpoints_take_a_token_for_all_namespaces():
    request = storage_service_pb2.ListCheckpointsRequest(job_id="job-1")
    assert _refused("StorageService/ListCheckpoints", ANN, request) == "NAMESPACE_NOT_ALLOWED"
    assert not _refused("StorageService/ListCheckpoints", ADMIN, request)
    assert not _refused("StorageService/ListCheckpoints", NODES["aggregator"], request)


# What ties nodes to what they write


def test_every_method_of_nodes_says_what_ties_them_to_what_they_write():
    """A new method for nodes is not finished before somebody has thought about that."""
    assert set(TIES) == set(node_methods())
    assert all(TIES.values())


def test_the_guarantees_list_the_ties():
    text = (ROOT / "docs" / "GUARANTEES.md").read_text()
    begin, end = "<!-- node methods: phalanx.keys.ties -->\n", "\n<!-- end of node methods -->"
    assert text.partition(begin)[2].partition(end)[0] == table()


def test_only_control_says_who_owns_ranges():
    request = storage_service_pb2.AppendJournalRequest(stream="tasks/job-1")
    check_append(NODES["aggregator"], request)
    request.owners.add(job_id="job-1", term=1, member_ids=["a-1"])
    for caller in (NODES["aggregator"], CODER):
        request.stream = "code" if caller is CODER else "tasks/job-1"
        with pytest.raises(PermissionDenied) as refused:
            check_append(caller, request)
        assert [each.field for each in refused.value.violations] == ["owners"]
    check_append(NODES["control"], request)
    check_append(ANYBODY, request)
