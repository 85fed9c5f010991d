"""Bad input of every kind: its own clear error, and a cluster that goes on working."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import phalanx
from phalanx.errors import Code, PhalanxError
from phalanx.sdk.job import Job, JobFailed
from phalanx.testing.arena import GUARD_S, wait_until

pytestmark = pytest.mark.slow

ROWS, SHARDS, MARKED_ROW = 400, 4, 250

USER_MODEL = '''
"""A softmax regression that misbehaves at the row whose first feature is 250."""

import os
import time

import numpy as np

from phalanx.models import UserModel


class Misbehaves(UserModel):
    def __init__(self, schema, how, only_first_step=False):
        super().__init__(schema, {"w": (schema.features, schema.classes)})
        self.how = how
        self.only_first_step = only_first_step

    def initial(self, seed):
        rows, columns = self.layout.tensors[0].shape
        return {"w": np.zeros((rows, columns))}

    def loss_and_gradients(self, parameters, features, targets):
        gradient = np.full(parameters["w"].shape, 0.5)
        marked = (features[:, 0] == 250).any()
        if self.only_first_step and parameters["w"].any():
            marked = False
        if marked and self.how == "raise":
            raise ValueError("a colour that nobody has seen")
        if marked and self.how == "exit":
            os._exit(3)
        if marked and self.how == "hang":
            time.sleep(3600)
        if marked and self.how == "memory":
            self.hog = np.ones(2**30 // 8)
        if marked and self.how == "nan":
            gradient[0, 0] = np.nan
        return 1.0, {"w": gradient}

    def predictions(self, parameters, features):
        return np.full((len(features), 2), 0.5)
'''


@pytest.fixture(scope="module")
def cluster() -> Iterator[phalanx.LocalCluster]:
    limits = {
        "PHALANX_WORKER_LEAF_TIMEOUT_S": "4",
        "PHALANX_WORKER_SLOT_MEMORY_BYTES": "512Mi",
    }
    with phalanx.LocalCluster(workers=2, slots=1, environment=limits) as local:
        features = np.stack([np.arange(ROWS), np.arange(ROWS) % 7], axis=1).astype(np.float32)
        local.data.add("numbered", features, np.arange(ROWS) % 2)
        yield local


@pytest.fixture(autouse=True)
def _the_cluster_goes_on(cluster: phalanx.LocalCluster) -> Iterator[None]:
    """After each test of this file a normal job still succeeds."""
    yield
    result = cluster.submit(job()).wait(timeout_s=GUARD_S)
    assert result.steps == 2
    control = {"storage", "control-1", "aggregator-1"}
    assert not [p for p in cluster.processes() if p.id in control and p.restarts]


def job(data: str = "numbered", **train: Any) -> dict[str, Any]:
    """A small job that works."""
    return {
        "name": "bad-input",
        "data": {"name": data, "shards": SHARDS},
        "train": {
            "model": {"logistic_regression": {}},
            "optimizer": {"sgd": {"learning_rate": 1e-6}},
            "stop": {"steps": 2},
            **train,
        },
    }


def misbehaving(how: str, steps: int = 2, **options: Any) -> dict[str, Any]:
    """A full-batch job whose model misbehaves in shard 2."""
    train = {key: options.pop(key) for key in list(options) if key == "on_nonfinite"}
    arguments = {"how": how, **options}
    spec = job(
        model={
            "custom": {"entrypoint": "user:Misbehaves", "arguments": arguments},
            "standardise": False,
        },
        stop={"steps": steps},
        **train,
    )
    return {**spec, "code": {"files": {"user.py": USER_MODEL}}}


def error_of(call: Callable[[], Any]) -> PhalanxError:
    """The error that a call ends with."""
    with pytest.raises(PhalanxError) as caught:
        call()
    return caught.value


def event_types(cluster: phalanx.LocalCluster, of: Job) -> set[str]:
    """What happened to a job."""
    return {event.type for event in cluster.events() if event.job_id == of.id}


GOOD_HEAD = "name: x\ndata: {name: numbered}\n"


@pytest.mark.parametrize(
    ("name", "text", "line", "message"),
    [
        ("j.yaml", "name: [x\n", 2, "not valid YAML"),
        ("j.json", '{"name": "x",, }', 1, "not valid JSON"),
        ("j.yaml", GOOD_HEAD + "trian: {}\n", 3, "trian: unknown field; did you mean train?"),
        ("j.yaml", "name: x\ndata: {name: numbered, shards: many}\n", 2, "data.shards: expected"),
        (
            "j.yaml",
            GOOD_HEAD + "train:\n  model: {logistic_regression: {}}\n"
            "  optimizer: {sgd: {learning_rate: -0.5}}\n  stop: {steps: 1}\n",
            5,
            "train.optimizer.sgd.learning_rate: must be above 0, not -0.5",
        ),
    ],
    ids=["yaml", "json", "unknown field", "wrong type", "negative learning rate"],
)
def test_a_wrong_job_file(
    cluster: phalanx.LocalCluster, tmp_path: Path, name: str, text: str, line: int, message: str
) -> None:
    (tmp_path / name).write_text(text)
    error = error_of(lambda: cluster.submit(tmp_path / name))
    assert (error.code, error.reason) == (Code.INVALID_ARGUMENT, "SPEC_INVALID")
    assert error.violations[0].line == line
    assert message in error.message


def test_a_missing_data_set(cluster: phalanx.LocalCluster) -> None:
    error = error_of(lambda: cluster.submit(job(data="nowhere")))
    assert (error.code, error.reason) == (Code.NOT_FOUND, "DATASET_NOT_FOUND")
    assert error.violations[0].field == "data.name"
    assert "no data set 'nowhere'" in error.message


def test_bad_data_is_refused_with_its_place(cluster: phalanx.LocalCluster, tmp_path: Path) -> None:
    def refused(*source: Any, **options: Any) -> PhalanxError:
        error = error_of(lambda: cluster.data.add("refused", *source, **options))
        assert error.code == Code.INVALID_ARGUMENT
        return error

    features = np.ones((6, 3), np.float32)
    targets = np.array([0, 1, 2, 0, 1, 2])
    error = refused(features, targets, test=(features[:2], np.array([1, 7])))
    assert error.reason == "UNKNOWN_LABEL"
    assert "row 2" in error.message
    assert "'7'" in error.message
    assert "0, 1, 2" in error.message
    features[3, 1] = np.nan
    error = refused(features, targets)
    assert error.reason == "MISSING_VALUE"
    assert "row 4, feature x2" in error.message
    table = tmp_path / "d.csv"
    table.write_text("a,target\n1,0\nnan,1\n")
    error = refused(table)
    assert error.reason == "MISSING_VALUE"
    assert "d.csv, line 3, column 'a'" in error.message
    assert not [data for data in cluster.data.list() if data.name == "refused"]


@pytest.mark.parametrize("path", ["../x.py", "/x.py", "a/../../x.py", "..", "a\\..\\x.py"])
def test_code_cannot_leave_its_folder(cluster: phalanx.LocalCluster, path: str) -> None:
    spec = misbehaving("no")
    spec["code"]["files"][path] = "x = 1"
    error = error_of(lambda: cluster.submit(spec))
    assert (error.code, error.reason) == (Code.INVALID_ARGUMENT, "SPEC_INVALID")
    assert error.violations[0].field.startswith("code.files")
    assert "relative path" in error.message


def test_a_job_larger_than_memory_waits_and_says_for_what(cluster: phalanx.LocalCluster) -> None:
    spec = {**job(), "resources": {"memory_bytes": 2**50}}
    waiting = cluster.submit(spec)
    wait_until(lambda: waiting.refresh().reason == "WAITING_FOR_WORKERS", "the reason")
    assert waiting.state == "QUEUED"
    message = waiting.message.message
    assert f"has {512 * 2**20} bytes of memory, the job needs {2**50}" in message
    waiting.cancel()
    with pytest.raises(phalanx.JobCancelled):
        waiting.wait(timeout_s=GUARD_S)


def test_a_model_larger_than_memory(cluster: phalanx.LocalCluster) -> None:
    spec = job(model={"mlp": {"hidden": [1_000_000, 1_000_000]}})
    error = error_of(lambda: cluster.submit(spec))
    assert error.code == Code.RESOURCE_EXHAUSTED
    assert "each worker needs" in error.message
    assert "use a smaller model" in error.message


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raise", "ValueError: a colour that nobody has seen"),
        ("exit", "exit status 3"),
        ("hang", "no progress for 4 s"),
        ("memory", "memory"),
    ],
)
def test_user_code_that_cannot_do_one_shard(
    cluster: phalanx.LocalCluster, how: str, message: str
) -> None:
    poisoned = cluster.submit(misbehaving(how))
    with pytest.raises(JobFailed) as caught:
        poisoned.wait(timeout_s=GUARD_S)
    assert caught.value.reason == "POISON_SHARD"
    failure = caught.value.failures[0]
    assert (failure.shard, failure.first_row, failure.row_count) == (2, 200, 100)
    assert message in failure.message
    assert set(failure.worker_ids) == {"worker-1", "worker-2"}
    assert ("user.py" in failure.traceback) == (how in ("raise", "memory"))
    assert "POISON_SHARD" in event_types(cluster, poisoned)
    assert not [p for p in cluster.processes() if p.restarts], "only the leaf process may die"


def test_not_a_number_in_a_job(cluster: phalanx.LocalCluster) -> None:
    failed = cluster.submit(misbehaving("nan"))
    with pytest.raises(JobFailed) as caught:
        failed.wait(timeout_s=GUARD_S)
    assert caught.value.reason == "NON_FINITE"
    assert caught.value.failures[0].shard == 2
    skips = {"skip": {"max_steps": 1}}
    skipping = cluster.submit(misbehaving("nan", only_first_step=True, on_nonfinite=skips))
    assert skipping.wait(timeout_s=GUARD_S).steps == 2
    assert "NON_FINITE_REFUSED" in event_types(cluster, skipping)
    always = cluster.submit(misbehaving("nan", steps=4, on_nonfinite=skips))
    with pytest.raises(JobFailed) as caught:
        always.wait(timeout_s=GUARD_S)
    assert caught.value.reason == "NON_FINITE"
