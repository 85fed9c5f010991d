import sys

import numpy as np
import pytest

import phalanx
from phalanx.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unimplemented,
)
from phalanx.sdk.verification import verify_job
from phalanx.testing.wheels import make_wheel
from tests.unit.sdk.nets import net

SPEC = {
    "name": "toy",
    "data": {"name": "toy", "shards": 4},
    "train": {
        "model": {"softmax_regression": {}},
        "optimizer": {"sgd": {"learning_rate": 0.5}},
        "batch_size": 64,
        "stop": {"steps": 8},
        "evaluation": {"every_steps": 4},
    },
}


def with_train(**changes):
    return {**SPEC, "train": {**SPEC["train"], **changes}}


@pytest.fixture
def data():
    generator = np.random.default_rng(7)
    features = generator.normal(size=(400, 3))
    return features, np.where(features[:, 0] > 0, "yes", "no")


@pytest.fixture
def cluster(data, monkeypatch, tmp_path):
    monkeypatch.setenv("PHALANX_CACHE", str(tmp_path))
    with phalanx.LocalCluster(workers=0) as local:
        local.data.add("toy", *data, test=0.25)
        yield local


def test_trains_and_predicts_original_labels(cluster, data):
    job = cluster.submit(SPEC)
    updates = list(job.watch())
    result = job.wait(timeout_s=60)
    steps = [update.step for update in updates]
    assert steps[0] >= 1
    assert steps == sorted(steps)
    assert updates[-1].state == "SUCCEEDED"
    assert result.steps == 8
    assert result.metrics["test/accuracy"] > 0.9
    model = cluster.models.get(result.model)
    assert np.mean(model.predict(data[0]) == data[1]) > 0.9
    assert model.parameters_sha256 == result.parameters_sha256


def test_the_same_job_gives_the_same_bits(cluster):
    first, second = cluster.submit(SPEC).wait(60), cluster.submit(SPEC).wait(60)
    assert first.parameters_sha256 == second.parameters_sha256
    assert (first.model, second.model) == ("toy@1", "toy@2")


def test_the_plan_comes_with_the_job_and_without_one(cluster):
    assert cluster.submit(SPEC).plan.steps == 8
    assert cluster.plan(SPEC).plan.steps == 8
    assert len(cluster.jobs()) == 1


def test_events_and_metrics_are_complete(cluster):
    job = cluster.submit(SPEC)
    job.wait(60)
    types = [event.type for event in cluster.events(job.id)]
    assert types == ["JOB_QUEUED", "JOB_STARTED", "MODEL_REGISTERED", "JOB_SUCCEEDED"]
    losses = [point.step for point in job.metrics(["train/loss"])]
    assert losses == list(range(1, 9))
    assert [point.step for point in job.metrics(["test/accuracy"])] == [4, 8]


def test_a_request_id_submits_once(cluster):
    first = cluster.submit(SPEC, request_id="nightly-1")
    assert cluster.submit(SPEC, request_id="nightly-1").id == first.id
    with pytest.raises(AlreadyExists):
        cluster.submit(with_train(batch_size=32), request_id="nightly-1")


def test_a_request_is_the_same_whatever_became_of_its_data(cluster, data):
    first = cluster.submit(SPEC, request_id="nightly-1")
    cluster.data.add("toy", *data, test=0.5)
    again = cluster.submit(SPEC, request_id="nightly-1")
    assert (again.id, again.plan) == (first.id, first.plan)
    assert cluster.submit(SPEC, request_id="nightly-2").id != first.id


def test_data_goes_though_a_set_of_tasks_is_there_which_reads_none(cluster):
    code = {"files": {"work.py": "def run(x):\n    return x\n"}}
    tasks = {"entrypoint": "work:run", "arguments": [{"x": 1}]}
    cluster.submit({"name": "numbers", "tasks": tasks, "code": code}).wait(60)
    cluster.data.delete("toy")
    assert cluster.data.list() == []


def choosing(*columns, **train):
    spec = with_train(**train)
    return {**spec, "data": {**spec["data"], "features": list(columns)}}


def test_a_job_trains_on_the_columns_that_it_chose(cluster, data):
    """The class follows from x1, so a model that does not see it knows nothing."""
    blind = cluster.submit(choosing("x3", "x2"))
    seeing = cluster.submit(choosing("x1"))
    assert blind.message.spec.data.features == ["x2", "x3"]
    assert blind.wait(60).metrics["test/accuracy"] < 0.7
    assert seeing.wait(60).metrics["test/accuracy"] > 0.9
    model = cluster.models.get(seeing.result.model)
    assert model.document["features"] == 1
    labels = model.predict(data[0])
    assert np.mean(labels == data[1]) > 0.9
    assert (model.predict(data[0][:, :1]) == labels).all()
    for job in (blind, seeing):
        assert verify_job(cluster, job.id).equal


def test_jobs_with_the_same_columns_are_the_same_job(cluster):
    one, other = (cluster.submit(choosing(*names)) for names in (("x3", "x1"), ("x1", "x3")))
    assert one.message.spec_sha256 == other.message.spec_sha256
    assert one.wait(60).parameters_sha256 == other.wait(60).parameters_sha256
    every, without = cluster.submit(choosing("x2", "x3", "x1")), cluster.submit(SPEC)
    assert every.message.spec_sha256 == without.message.spec_sha256
    again = cluster.submit(choosing("x1", "x3"), request_id="once")
    assert cluster.submit(choosing("x1", "x3"), request_id="once").plan == again.plan
    assert again.plan.worker_bytes < without.plan.worker_bytes


def test_columns_that_there_are_not_are_refused_at_submission(cluster):
    with pytest.raises(InvalidArgument, match="x1 to x3") as caught:
        cluster.submit(choosing("x1", "x4"))
    assert [each.field for each in caught.value.violations] == ["data.features[1]"]
    assert cluster.jobs() == []


def test_a_model_to_start_from_has_to_have_the_chosen_features(cluster):
    few = cluster.submit(choosing("x1", "x3")).wait(60).model
    assert cluster.submit(choosing("x1", "x3", start={"model": few})).wait(60).steps == 8
    with pytest.raises(
        InvalidArgument, match=r"shape \[2, 2\] and the model of this job needs \[3,"
    ):
        cluster.submit(with_train(start={"model": few}))


def test_a_model_to_start_from_has_to_have_the_chosen_columns(cluster, data):
    few = cluster.submit(choosing("x1", "x3")).wait(60).model
    jobs = len(cluster.jobs())
    with pytest.raises(
        InvalidArgument, match=r"on the columns x1, x3, and .* on x1, x2;"
    ) as caught:
        cluster.submit(choosing("x1", "x2", start={"model": few}))
    assert [each.field for each in caught.value.violations] == ["train.start.model"]
    assert len(cluster.jobs()) == jobs
    # Columns with names are compared though the job takes all of its data set.
    features, target = data
    table = {"a": features[:, 0], "b": features[:, 1], "y": target}
    cluster.data.add("named", {**table, "c": features[:, 2]}, target="y", test=0.25)
    cluster.data.add("two", table, target="y", test=0.25)

    def on(name, *columns, **train):
        spec = choosing(*columns, **train)
        return cluster.submit({**spec, "data": {**spec["data"], "name": name}})

    other = on("named", "b", "c").wait(60).model
    same = on("named", "b", "a").wait(60).model
    with pytest.raises(InvalidArgument, match="on the columns b, c, and this job is on a, b;"):
        on("two", start={"model": other})
    assert on("two", start={"model": same}).wait(60).steps == 8
    # As ever where nobody chose: a model may be taken to other data of the same shape.
    whole = on("two").wait(60).model
    renamed = {"p": features[:, 0], "q": features[:, 1], "y": target}
    cluster.data.add("renamed", renamed, target="y", test=0.25)
    assert on("renamed", start={"model": whole}).wait(60).steps == 8


def test_a_job_can_be_paused_resumed_and_cancelled(cluster):
    job = cluster.submit(with_train(stop={"steps": 1_000_000}))
    updates = job.watch()
    next(updates)
    job.pause()
    assert next(update for update in updates if update.state == "PAUSED")
    with pytest.raises(FailedPrecondition):
        job.pause()
    job.resume()
    job.cancel("enough")
    with pytest.raises(phalanx.JobCancelled, match="enough"):
        job.wait(60)


def test_code_that_raises_fails_the_job_with_its_traceback(cluster):
    code = "def build(schema):\n    raise RuntimeError('broken model')\n"
    spec = with_train(model={"custom": {"entrypoint": "mine:build"}})
    job = cluster.submit({**spec, "code": {"files": {"mine.py": code}}})
    with pytest.raises(phalanx.JobFailed) as failed:
        job.wait(60)
    assert "broken model" in str(failed.value)
    assert failed.value.job_id == job.id
    assert failed.value.failures[0].message


def test_code_that_exits_ends_its_job_and_nothing_else(cluster):
    code = {"files": {"mine.py": "import sys\n\ndef build(*_, **__):\n    sys.exit('enough')\n"}}
    model = with_train(model={"custom": {"entrypoint": "mine:build"}})
    tasks = {"entrypoint": "mine:build", "arguments": [{}], "attempts": 1}
    for spec in (model, {"name": "toy", "tasks": tasks}):
        with pytest.raises(phalanx.JobFailed, match="SystemExit: enough"):
            cluster.submit({**spec, "code": code}).wait(60)
    assert cluster.submit(SPEC).wait(60).steps == 8


def test_a_wrong_spec_names_every_field(cluster):
    with pytest.raises(InvalidArgument) as wrong:
        cluster.submit(with_train(batch_size=-1, l2=-2))
    fields = {violation.field for violation in wrong.value.violations}
    assert fields == {"train.batch_size", "train.l2"}


def test_what_a_cluster_without_processes_cannot_do_says_so(cluster):
    with pytest.raises(Unimplemented):
        cluster.drain("worker-1")
    with pytest.raises(FailedPrecondition):
        cluster.add_worker()
    assert cluster.processes() == []
    with pytest.raises(InvalidArgument):
        phalanx.LocalCluster(workers=0, state="somewhere")


def test_data_and_models_by_version(cluster, data):
    cluster.data.add("toy", *data, test=0.5)
    assert [item.version for item in cluster.data.list()] == [1, 2]
    assert cluster.data.get("toy").version == 2
    assert cluster.data.get("toy@1").rows["test"] < cluster.data.get("toy@2").rows["test"]
    cluster.data.delete("toy@2")
    assert cluster.data.get("toy").version == 1
    cluster.submit(SPEC).wait(60)
    with pytest.raises(FailedPrecondition):
        cluster.data.delete("toy")
    cluster.models.delete("toy")
    with pytest.raises(NotFound):
        cluster.models.get("toy")


def test_what_a_job_used_goes_by_force_and_only_once_the_job_is_over(cluster, data):
    first = cluster.submit(SPEC)
    first.wait(60)
    second = cluster.submit(with_train(start={"model": "toy"}))
    second.wait(60)
    for delete, name, users in (
        (cluster.data.delete, "toy", f"{first.id}, {second.id}"),
        (cluster.data.delete, "toy@1", f"{first.id}, {second.id}"),
        (cluster.models.delete, "toy@1", second.id),
        (cluster.models.delete, "toy", second.id),
    ):
        with pytest.raises(FailedPrecondition) as refused:
            delete(name)
        assert refused.value.reason == "REFERENCED"
        shown = sorted(users.split(", "))
        assert f"was used by {', '.join(shown)}:" in refused.value.message
    cluster.models.delete("toy@2")  # nothing starts from it; the job that made it does not mind
    cluster.models.delete("toy@1", force=True)
    cluster.data.delete("toy", force=True)
    assert cluster.data.add("toy", *data).version == 2, "an old version never means other data"
    assert [job.state for job in cluster.jobs()] == ["SUCCEEDED", "SUCCEEDED"]


def test_what_a_failed_job_used_stays_since_it_may_be_tried_again(cluster):
    files = {"broken.py": net("raise ValueError('never')")}
    spec = with_train(model={"custom": {"entrypoint": "broken:Net"}})
    job = cluster.submit({**spec, "code": {"files": files}})
    with pytest.raises(phalanx.JobFailed):
        job.wait(60)
    with pytest.raises(FailedPrecondition) as refused:
        cluster.data.delete("toy", force=True)
    assert refused.value.reason == "IN_USE"
    job.delete()
    cluster.data.delete("toy")


def test_a_job_starts_from_the_version_of_a_model_that_was_there(cluster):
    cluster.submit(SPEC).wait(60)
    job = cluster.submit(with_train(start={"model": "default/toy"}))
    assert job.message.spec.train.start.model == "default/toy@1"
    result = job.wait(60)
    assert result.model == "toy@2"
    assert cluster.models.get("toy@1").parameters_sha256 != result.parameters_sha256
    with pytest.raises(NotFound):
        cluster.submit(with_train(start={"model": "nobody/toy"}))


def test_a_model_of_another_shape_is_refused_before_the_job_is_taken(cluster):
    cluster.submit(SPEC).wait(60)
    wide = with_train(model={"mlp": {"hidden": [4]}}, start={"model": "toy"})
    with pytest.raises(InvalidArgument, match=r"no tensor 'layers\.0\.weights'") as refused:
        cluster.submit(wide)
    assert [each.field for each in refused.value.violations] == ["train.start.model"]
    assert len(cluster.jobs()) == 1


def test_data_of_another_namespace_goes_by_its_full_name(cluster, data):
    spec = {**SPEC, "namespace": "team", "data": {"name": "default/toy", "shards": 4}}
    job = cluster.submit(spec)
    assert job.message.spec.data.name == "default/toy@1"
    job.wait(60)
    assert [model.namespace for model in cluster.models.list()] == []
    with pytest.raises(FailedPrecondition):
        cluster.data.delete("toy@1")
    with pytest.raises(NotFound):
        cluster.submit({**spec, "data": {"name": "toy"}})


def test_data_may_be_a_table_or_have_its_own_test_split(cluster, data):
    features, labels = data
    added = cluster.data.add("pair", features, labels, test=(features[:10], labels[:10]))
    assert dict(added.rows) == {"train": 400, "test": 10}
    table = cluster.data.add("table", {"a": [1.0, 2.0, 3.0], "b": [0, 1, 0]}, target="b")
    assert (table.features, table.target) == (1, "b")
    with pytest.raises(InvalidArgument):
        cluster.data.add("three", features, labels, labels)
    with pytest.raises(InvalidArgument, match="unknown option"):
        cluster.data.add("typo", features, labels, tset=0.2)


def test_nothing_is_left_behind(data):
    cluster = phalanx.LocalCluster(workers=0)
    cluster.data.add("toy", *data)
    folder = cluster.state_dir
    assert folder.exists()
    cluster.close()
    assert not folder.exists()


NET = net(
    """
error = features @ parameters["w"] - np.eye(self.schema.classes, dtype=np.float32)[targets]
return float((error**2).sum()), {"w": RATE * features.T @ error}
""",
    imports="from mine.rates import RATE",
)


def test_a_wheel_runs_here_and_goes_with_its_model(cluster, data, tmp_path):
    files = {"mine/__init__.py": "", "mine/net.py": NET, "mine/rates.py": "RATE = 0.5\n"}
    wheel = cluster.code.add(make_wheel(tmp_path, files))
    assert cluster.code.add(tmp_path / wheel.file_name) == wheel
    assert cluster.code.list() == [wheel]
    model = {"custom": {"entrypoint": "mine.net:Net"}}
    spec = {**with_train(model=model), "code": {"wheels": [wheel.sha256]}}
    job = cluster.submit(spec)
    result = job.wait(60)
    assert "mine" not in sys.modules
    assert verify_job(cluster, job.id).equal
    with pytest.raises(FailedPrecondition, match=wheel.sha256):
        cluster.models.get(result.model)
    model = cluster.models.get(result.model, allow_code=True)
    assert np.mean(model.predict(data[0]) == data[1]) > 0.8


def test_a_wheel_that_was_never_added_is_named(cluster):
    with pytest.raises(NotFound, match="no wheel") as caught:
        cluster.submit({**SPEC, "code": {"wheels": ["0" * 64]}})
    assert caught.value.violations[0].field == "code.wheels[0]"


def test_all_that_is_wrong_comes_in_one_answer(cluster):
    spec = {
        **with_train(batch_size=-1),
        "resources": {"gpus": 1},
        "data": {"name": "toy", "shards": 9999},
    }
    wrong = {"train.batch_size", "resources.gpus"}
    for name, fields in (("toy", {"data.shards"}), ("other", {"data.name"}), ("N", {"data.name"})):
        spec["data"]["name"] = name
        with pytest.raises(InvalidArgument) as caught:
            cluster.submit(spec)
        assert {each.field for each in caught.value.violations} == wrong | fields
