"""Values of a wrong kind: each verb of the SDK names the argument and what it takes."""

from pathlib import Path

import numpy as np
import pytest

import phalanx
from phalanx.errors import InvalidArgument, PhalanxError
from phalanx.sdk import arguments
from phalanx.sdk.job import Job
from phalanx.v1 import job_pb2

ROWS = np.zeros((4, 2), np.float32)
LABELS = np.array([0, 1, 0, 1])
KINDS = [None, ["job.yaml"], 5, 1.5, b"job.yaml", object()]


@pytest.fixture(scope="module")
def cluster():
    with phalanx.LocalCluster(workers=0) as local:
        local.data.add("kinds", ROWS, LABELS)
        yield local


def a_job(cluster):
    return Job(cluster.backend, job_pb2.Job(id="kinds-1"))


VERBS = [
    ("job", lambda cluster, value: cluster.submit(value)),
    ("job", lambda cluster, value: cluster.plan(value)),
    ("path", lambda cluster, value: phalanx.load(value)),
    ("job_id", lambda cluster, value: cluster.get(value)),
    ("job_id", lambda cluster, value: cluster.verify(value)),
    ("job_id", lambda cluster, value: list(cluster.events(value))),
    ("states", lambda cluster, value: cluster.jobs(value)),
    ("worker_id", lambda cluster, value: cluster.drain(value)),
    ("name", lambda cluster, value: cluster.data.add(value, ROWS, LABELS)),
    ("name", lambda cluster, value: cluster.data.get(value)),
    ("name", lambda cluster, value: cluster.data.manifest(value)),
    ("name", lambda cluster, value: cluster.data.delete(value)),
    ("name", lambda cluster, value: cluster.models.describe(value)),
    ("name", lambda cluster, value: cluster.models.get(value)),
    ("name", lambda cluster, value: cluster.models.delete(value)),
    ("folder", lambda cluster, value: cluster.models.download("kinds", value)),
    ("file", lambda cluster, value: cluster.models.export("kinds", value)),
    ("path", lambda cluster, value: cluster.code.add(value)),
    ("reason", lambda cluster, value: a_job(cluster).cancel(value)),
    ("worker_id", lambda cluster, value: list(a_job(cluster).logs(worker_id=value))),
    ("namespace", lambda cluster, value: phalanx.connect(namespace=value)),
]


@pytest.mark.parametrize("value", KINDS, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize(("field", "verb"), VERBS)
def test_a_value_of_a_wrong_kind_is_named(field, verb, value, cluster):
    with pytest.raises(InvalidArgument) as caught:
        verb(cluster, value)
    assert f"{field} is " in caught.value.message
    assert "; give " in caught.value.message
    assert [wrong.field for wrong in caught.value.violations] == [field]


@pytest.mark.parametrize(
    ("field", "verb"),
    [
        ("request_id", lambda cluster: cluster.submit({}, request_id=5)),
        ("namespace", lambda cluster: cluster.submit({}, namespace=["x"])),
        ("timeout_s", lambda cluster: a_job(cluster).wait("soon")),
        ("timeout_s", lambda cluster: cluster.drain("worker-1", timeout_s="soon")),
        ("timeout_s", lambda cluster: phalanx.connect(timeout_s="soon")),
        ("address", lambda cluster: phalanx.connect(7410)),
        ("names", lambda cluster: a_job(cluster).metrics(5)),
        ("names", lambda cluster: a_job(cluster).metrics("train/loss")),
        ("tasks", lambda cluster: a_job(cluster).results(3)),
        ("tasks", lambda cluster: a_job(cluster).results(["first"])),
        ("feature_names", lambda cluster: cluster.data.add("k", ROWS, LABELS, feature_names=5)),
        ("missing", lambda cluster: cluster.data.add("k", ROWS, LABELS, missing=["mean"])),
        ("seed", lambda cluster: cluster.data.add("k", ROWS, LABELS, seed="1")),
        ("workers", lambda cluster: phalanx.LocalCluster(None)),
        ("slots", lambda cluster: phalanx.LocalCluster(1, slots="2")),
        ("state", lambda cluster: phalanx.LocalCluster(1, state=5)),
    ],
)
def test_so_is_an_option(field, verb, cluster):
    with pytest.raises(InvalidArgument) as caught:
        verb(cluster)
    assert [wrong.field for wrong in caught.value.violations] == [field]


@pytest.mark.parametrize(
    ("job", "said"),
    [
        ({"name": b"x"}, "bytes is not JSON serializable"),
        ({("a", "b"): 1}, "keys must be str"),
        ("name: kinds\ntrain: {}", "several lines"),
        ("\0", "no path"),
        ("no-such-job.yaml", "there is no file no-such-job.yaml"),
    ],
)
def test_a_job_that_is_none_is_told(job, said, cluster):
    with pytest.raises(PhalanxError, match=said):
        cluster.submit(job)


@pytest.mark.parametrize("name", ["", "\0", "two\nlines", "Upper"])
def test_the_cluster_in_the_process_refuses_the_names_that_storage_refuses(name, cluster):
    with pytest.raises(InvalidArgument, match="is not a name"):
        cluster.data.add(name, ROWS, LABELS)


def test_numbers_of_numpy_are_numbers():
    assert arguments.wholes("tasks", np.arange(3), "tasks") == [0, 1, 2]
    assert arguments.seconds("timeout_s", np.float32(0.5)) == 0.5


def test_a_path_may_be_any_path_like():
    assert arguments.path("file", Path("a.npz"), "a file") == Path("a.npz")
