import errno
import io
import json
import os
import threading

import pytest

from phalanx.cli.commands.data import say_silent
from phalanx.errors import InvalidArgument, Unavailable, Violation
from phalanx.specs import load_yaml, to_json
from phalanx.testing.wheels import make_wheel
from phalanx.v1 import (
    cluster_service_pb2,
    dataset_service_pb2,
    job_pb2,
    job_service_pb2,
    model_service_pb2,
)


def write(tmp_path, text, name="job.yaml"):
    file = tmp_path / name
    file.write_text(text)
    return str(file)


def test_submit_writes_only_the_id_to_standard_output(phalanx, cluster, tmp_path):
    outcome = phalanx("submit", write(tmp_path, "name: digits\n"))
    assert outcome.code == 0
    assert outcome.out.strip() in cluster.jobs
    assert f"phalanx --address {cluster.address} watch {outcome.out}" in outcome.err
    assert "10 steps" in outcome.err


@pytest.mark.parametrize("group", ["data", "models"])
def test_a_deletion_says_whether_all_versions_are_gone(phalanx, cluster, group):
    for name in ("all", "one@2", "used@1"):
        cluster.datasets[name] = dataset_service_pb2.Dataset(name=name[:3], version=2)
        cluster.models[name] = model_service_pb2.ModelVersion(name=name[:3], version=2)
    assert phalanx(group, "delete", "all").err.strip() == "deleted all, all versions"
    assert phalanx(group, "delete", "one@2").err.strip() == "deleted one@2"
    assert phalanx(group, "delete", "used@1", "--force").code == 0
    asked = cluster.requests("DeleteDataset" if group == "data" else "DeleteModel")
    assert [request.force for request in asked] == [False, False, True]


def test_submit_reads_standard_input(phalanx, cluster, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO('{"name": "from-json"}'))
    assert phalanx("submit", "-").code == 0
    assert cluster.requests("SubmitJob")[0].spec.name == "from-json"


def test_submit_sets_fields(phalanx, cluster, tmp_path):
    file = write(tmp_path, "name: digits\ntrain: {batch_size: 1}\n")
    assert phalanx("submit", file, "--set", "train.batch_size=64", "--set", "seed=7").code == 0
    spec = cluster.requests("SubmitJob")[0].spec
    assert (spec.train.batch_size, spec.seed) == (64, 7)


def test_the_same_request_id_submits_once(phalanx, cluster, tmp_path):
    file = write(tmp_path, "name: digits\n")
    first = phalanx("submit", file, "--request-id", "nightly")
    second = phalanx("submit", file, "--request-id", "nightly")
    assert first.out == second.out
    assert len(cluster.jobs) == 1
    other = phalanx("submit", write(tmp_path, "name: other\n"), "--request-id", "nightly")
    assert other.code == 6


def test_namespace_reaches_the_spec(phalanx, cluster, tmp_path):
    phalanx("--namespace", "team", "submit", write(tmp_path, "name: digits\n"))
    assert cluster.requests("SubmitJob")[0].spec.namespace == "team"


def test_every_wrong_field_of_a_file_is_told_with_its_line(offline, tmp_path):
    file = write(tmp_path, "name: digits\ntrane: {}\ntrain: {batch_size: many}\n")
    outcome = offline("submit", file)
    assert outcome.code == 2
    assert file in outcome.err
    assert "line 2" in outcome.err
    assert "line 3" in outcome.err


def test_what_the_server_finds_wrong_gets_the_line_of_the_file(phalanx, cluster, tmp_path):
    wrong = Violation("train.batch_size", "is negative")
    cluster.fail("SubmitJob", InvalidArgument("1 wrong field", violations=[wrong]))
    file = write(tmp_path, "name: digits\n\ntrain:\n  batch_size: -1\n")
    outcome = phalanx("submit", file)
    assert outcome.code == 2
    assert "line 4: train.batch_size  is negative" in outcome.err


def test_a_missing_file_gives_3(offline):
    assert offline("submit", "no-such-file.yaml").code == 3


def test_submit_and_wait_gives_the_outcome(phalanx, cluster, tmp_path):
    file = write(tmp_path, "name: digits\n")
    failed = job_pb2.Job(id="digits-00000000", state=job_pb2.Job.STATE_FAILED, message="broken")
    cluster.watch_script.append(job_service_pb2.WatchJobResponse(job=failed))
    outcome = phalanx("submit", file, "--wait")
    assert outcome.code == 1
    assert "broken" in outcome.err


def test_train_shows_the_job_to_its_end(phalanx, cluster, tmp_path):
    done = job_pb2.Job(
        id="digits-00000000",
        state=job_pb2.Job.STATE_SUCCEEDED,
        result=job_pb2.Result(model="digits@1", parameters_sha256="ab" * 32, bit_identical=True),
    )
    cluster.watch_script.append(job_service_pb2.WatchJobResponse(job=done))
    outcome = phalanx("train", write(tmp_path, "name: digits\n"))
    assert outcome.code == 0
    assert "digits@1" in outcome.out
    assert "ab" * 32 in outcome.out


def test_watch_writes_plain_lines_without_a_terminal(phalanx, cluster):
    running = job_pb2.Job(id="digits-1", state=job_pb2.Job.STATE_RUNNING)
    cluster.jobs["digits-1"] = running
    worker = job_pb2.WorkerProgress(
        worker_id="worker-1", shards=[job_pb2.ShardRange(first=0, count=4)]
    )
    progress = job_pb2.Progress(step=3, total_steps=9, metrics={"train/loss": 0.5})
    progress.workers.append(worker)
    lost = job_pb2.Event(sequence=1, type="WORKER_LOST", worker_id="worker-2", step=3)
    done = job_pb2.Job(id="digits-1", state=job_pb2.Job.STATE_SUCCEEDED)
    cluster.watch_script.extend(
        [
            job_service_pb2.WatchJobResponse(progress=progress),
            job_service_pb2.WatchJobResponse(event=lost),
            job_service_pb2.WatchJobResponse(job=done),
        ]
    )
    outcome = phalanx("watch", "digits-1")
    assert outcome.code == 0
    assert "step 3/9" in outcome.out
    assert "worker-1:0-3" in outcome.out
    assert "WORKER_LOST step=3 worker-2" in outcome.out
    assert "digits-1 SUCCEEDED" in outcome.out


@pytest.mark.parametrize("state", ["running", "RUNNING", "STATE_RUNNING"])
def test_jobs_by_state(phalanx, cluster, state):
    cluster.jobs["a"] = job_pb2.Job(id="a", state=job_pb2.Job.STATE_RUNNING)
    cluster.jobs["b"] = job_pb2.Job(id="b", state=job_pb2.Job.STATE_FAILED)
    outcome = phalanx("jobs", "--state", state)
    assert "a " in outcome.out
    assert "FAILED" not in outcome.out


def test_a_job_id_is_never_cut(phalanx, cluster):
    name = "a-name-of-forty-characters-" + "x" * 13 + "-abcd2345"
    cluster.jobs[name] = job_pb2.Job(id=name, state=job_pb2.Job.STATE_RUNNING)
    assert name in phalanx("jobs").out


def test_drain_waits_until_the_worker_has_left(phalanx, cluster):
    cluster.cluster.workers.append(cluster_service_pb2.Worker(id="worker-1"))
    assert "has left" in phalanx("drain", "worker-1", "--wait").err
    assert phalanx("drain", "worker-9").code == 3


def test_logs_name_worker_shard_and_step(phalanx, cluster):
    cluster.jobs["digits-1"] = job_pb2.Job(id="digits-1")
    cluster.logs = [
        job_service_pb2.ReadJobLogsResponse(worker_id="worker-1", shard=3, step=5, text="hello"),
        job_service_pb2.ReadJobLogsResponse(worker_id="worker-2", text="other"),
    ]
    outcome = phalanx("logs", "digits-1", "--worker", "worker-1")
    assert "worker-1 shard 3 step 5  hello" in outcome.out
    assert "other" not in outcome.out


def test_code_travels_as_a_pinned_blob(phalanx, cluster, tmp_path):
    wheel = make_wheel(tmp_path, {"mine.py": "answer = 42\n"})
    digest = phalanx("code", "add", str(wheel)).out.strip()
    assert cluster.blobs[digest] == wheel.read_bytes()
    assert cluster.requests("SetPins")[0].pins[0].blob == digest
    phalanx("code", "add", str(wheel))
    listed = phalanx("--json", "code", "list").json()["wheels"]
    assert [item["file_name"] for item in listed] == [wheel.name]


@pytest.mark.parametrize("name", ["mine-1.0-py3-none-any.whl", "mine.zip"])
def test_code_refuses_what_is_no_wheel(phalanx, tmp_path, name):
    (tmp_path / name).write_text("no archive")
    assert phalanx("code", "add", str(tmp_path / name)).code == 2


def test_code_refuses_a_wheel_for_one_kind_of_machine(phalanx, tmp_path):
    wheel = make_wheel(tmp_path, {"mine.py": ""}, tag="cp311-cp311-linux_x86_64")
    outcome = phalanx("code", "add", str(wheel))
    assert outcome.code == 2
    assert "linux_x86_64" in outcome.err


def test_what_the_server_finds_wrong_in_a_setting_has_no_line(phalanx, cluster, tmp_path):
    wrong = Violation("train.batch_size", "is negative")
    cluster.fail("SubmitJob", InvalidArgument("train.batch_size: is negative", violations=[wrong]))
    file = write(tmp_path, "name: digits\ntrain:\n  batch_size: 1\n")
    outcome = phalanx("submit", file, "--set", "train.batch_size=-1")
    assert outcome.err == f"error: {file}: train.batch_size: is negative\n"


def test_one_wrong_field_that_the_server_finds_is_told_like_one_of_the_file(
    phalanx, cluster, tmp_path
):
    wrong = Violation("train.batch_size", "is negative")
    cluster.fail("SubmitJob", InvalidArgument("train.batch_size: is negative", violations=[wrong]))
    file = write(tmp_path, "name: digits\ntrain:\n  batch_size: -1\n")
    assert phalanx("submit", file).err == f"error: {file}:3: train.batch_size: is negative\n"


def test_the_spec_that_a_dry_run_shows_is_a_job_file(phalanx, cluster, tmp_path):
    code = "import numpy as np\n\n\ndef model():\n    return np.pi\n"
    spec = load_yaml("name: digits\nseed: 7\nretain: 1.5h\ndata: {name: d@2, shards: 3}\n")
    spec.code.files["m.py"] = code
    spec.code.files["odd.py"] = " # begins with a space"
    spec.labels["since"] = "true"
    spec.labels["a: b"] = "#1\n"
    spec.train.model.mlp.hidden.extend([32, 8])
    spec.train.model.standardise = True
    job = write(tmp_path, json.dumps(to_json(spec)), "job.json")
    shown = phalanx("submit", job, "--dry-run")
    assert load_yaml(shown.out) == cluster.requests("SubmitJob")[0].spec
    assert f"\n{' ' * 4}m.py: |\n{' ' * 6}import numpy as np\n\n" in shown.out
    assert "nothing was submitted" in shown.err


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("models", "get", "digits", "{file}/new"), 3),
        (("events", "--job", "nobody"), 3),
        (("watch", "digits-1", "--plot", "{file}.mp3"), 2),
        (("watch", "digits-1", "--plot", "nowhere/curves.png"), 3),
        (("events", "--incidents", "--incident", "incident-1-1"), 2),
    ],
)
def test_what_cannot_be_is_no_defect(phalanx, cluster, tmp_path, arguments, code):
    file = write(tmp_path, "")
    cluster.jobs["digits-1"] = job_pb2.Job(id="digits-1", state=job_pb2.Job.STATE_SUCCEEDED)
    outcome = phalanx(*(each.format(file=file) for each in arguments))
    assert outcome.code == code
    assert outcome.err.startswith("error: ")


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.ENOENT, 3), (errno.EACCES, 5), (errno.ENOSPC, 6), (errno.EISDIR, 2)],
)
def test_a_file_that_cannot_be_used_is_no_defect(phalanx, cluster, monkeypatch, number, code):
    def refuse(self, *states):
        raise OSError(number, os.strerror(number), "/some/file")

    monkeypatch.setattr("phalanx.sdk.cluster.Cluster.jobs", refuse)
    outcome = phalanx("--json", "jobs")
    assert outcome.code == code
    assert "/some/file" in outcome.error()["message"]


def test_a_data_set_may_be_called_like_a_service(offline):
    outcome = offline("--address", "127.0.0.1:9", "data", "add", "storage", "nowhere.csv", "--json")
    assert outcome.code == 3
    assert outcome.error()["code"] == "NOT_FOUND"


def test_data_add_says_what_it_waits_for(phalanx, cluster, tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_text("x,y\n1,a\n2,b\n")
    told = threading.Event()

    def tell():
        say_silent()
        told.set()

    def register(*_):
        # As where storage is stopped, and goes on once that was said.
        assert told.wait(30)
        raise Unavailable("storage went away")

    monkeypatch.setattr("phalanx.sdk.silence.SILENCE_S", 0.0)
    monkeypatch.setattr("phalanx.cli.commands.data.say_silent", tell)
    monkeypatch.setattr("phalanx.sdk.data.DataSets.register", register)
    monkeypatch.setattr("phalanx.sdk.data._Sink.put", lambda *_: "0" * 64)
    outcome = phalanx("data", "add", "a", str(tmp_path / "a.csv"))
    assert "storage has not answered for some seconds; waiting for it" in outcome.err
    assert outcome.out == ""
