import json
import re

import pytest

from phalanx.sdk.wire_json import message_to_json
from phalanx.v1 import (
    cluster_service_pb2,
    dataset_service_pb2,
    job_pb2,
    job_service_pb2,
    model_service_pb2,
    storage_service_pb2,
)
from phalanx.v1 import job_spec_pb2 as specs

BIG = 2**53 - 1
SNAKE = re.compile(r"[a-z0-9_]+")
FREE_KEYS = {"metrics", "labels", "details", "tags", "jobs", "rows", "weights", "files"}


def assert_snake_case(value, path=""):
    if isinstance(value, dict):
        for key, item in value.items():
            if path.rpartition(".")[2] not in FREE_KEYS:
                assert SNAKE.fullmatch(key), f"{path}.{key}"
            assert_snake_case(item, f"{path}.{key}")
    elif isinstance(value, list):
        for item in value:
            assert_snake_case(item, path)


@pytest.fixture
def job(cluster):
    message = job_pb2.Job(
        id="digits-1",
        state=job_pb2.Job.STATE_RUNNING,
        spec=specs.JobSpec(name="digits", seed=BIG, data=specs.Data(name="digits", shards=16)),
        progress=job_pb2.Progress(step=BIG, metrics={"train/loss": 0.5}),
    )
    message.create_time.FromJsonString("2030-01-02T03:04:05Z")
    cluster.jobs[message.id] = message
    return message


def test_whole_numbers_of_64_bits_are_numbers_and_names_are_snake_case(job):
    shown = message_to_json(job)
    assert shown["progress"]["step"] == BIG
    assert shown["spec"]["seed"] == BIG
    assert shown["spec_sha256"] == ""
    assert shown["create_time"] == "2030-01-02T03:04:05Z"
    assert shown["state"] == "STATE_RUNNING"
    assert_snake_case(shown)


def test_durations_free_arguments_and_special_numbers():
    spec = specs.JobSpec(name="x")
    spec.retain.FromJsonString("90.500s")
    spec.train.model.custom.arguments.update({"camelCase": 1, "list": [True, None]})
    spec.train.l2 = float("nan")
    shown = message_to_json(spec)
    assert shown["retain"] == "90.500s"
    arguments = json.dumps(shown["train"]["model"]["custom"]["arguments"])
    # As whoever wrote it did: 1 and 1.0 may mean different things where it is read again.
    assert arguments == '{"camelCase": 1, "list": [true, null]}'
    spec.train.model.custom.arguments.update({name: {name: 1} for name in "zyxwvutsrqponm"})
    shown = message_to_json(spec)
    names = list(shown["train"]["model"]["custom"]["arguments"])
    assert names == sorted(names)
    assert shown["train"]["l2"] == "NaN"
    json.dumps(shown, allow_nan=False)


def test_members_of_a_choice_and_optional_fields_show_only_when_set():
    shown = message_to_json(specs.Train(synchronous=specs.Synchronous()))
    assert shown["synchronous"] == {"backup_shards": 0}
    assert "stale" not in shown
    assert "seed" not in message_to_json(specs.JobSpec())


def test_jobs_is_one_object_with_a_token(phalanx, job):
    shown = phalanx("--json", "jobs").json()
    assert set(shown) == {"jobs", "next_page_token"}
    assert shown["next_page_token"] == ""
    assert [item["id"] for item in shown["jobs"]] == ["digits-1"]
    assert_snake_case(shown)


@pytest.mark.parametrize(
    "command", [("jobs",), ("jobs", "--dead-letters"), ("workers",), ("metrics", "digits-1")]
)
def test_a_list_that_may_not_be_whole_says_so(phalanx, cluster, job, command):
    cluster.incomplete = "another one may lead by now"
    told = phalanx("--json", *command)
    assert (told.code, told.err) == (0, "")
    assert told.json()["incomplete"] == cluster.incomplete
    told = phalanx(*command)
    assert told.code == 0
    assert told.err.splitlines()[0] == f"warning: {cluster.incomplete}"


def test_events_that_may_not_be_all_are_shown_and_end_as_an_error(phalanx, cluster):
    cluster.events = [job_pb2.Event(sequence=1, type="JOB_QUEUED", message="x is queued")]
    cluster.incomplete = "another one may lead by now"
    told = phalanx("events")
    assert told.code == 4
    assert "x is queued" in told.out
    assert cluster.incomplete in told.err


def test_json_may_stand_at_the_end(phalanx, job):
    assert phalanx("jobs", "--json").json()["jobs"][0]["id"] == "digits-1"


def test_all_pages_are_fetched(phalanx, cluster):
    for number in range(3):
        cluster.jobs[f"j-{number}"] = job_pb2.Job(id=f"j-{number}", state=job_pb2.Job.STATE_QUEUED)
    assert len(phalanx("--json", "jobs").json()["jobs"]) == 3
    assert len(cluster.requests("ListJobs")) == 3


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (("jobs",), "jobs"),
        (("workers",), "workers"),
        (("data", "list"), "datasets"),
        (("models", "list"), "models"),
        (("code", "list"), "wheels"),
    ],
)
def test_an_empty_list_is_a_list(phalanx, command, name):
    assert phalanx("--json", *command).json() == {name: [], "next_page_token": ""}


@pytest.mark.parametrize("command", ["show", "pause", "resume", "cancel", "retry"])
def test_a_command_on_a_job_gives_the_job(phalanx, job, command):
    shown = phalanx("--json", command, "digits-1").json()
    assert shown["id"] == "digits-1"
    assert_snake_case(shown)


def test_deletions_give_an_empty_object(phalanx, cluster, job):
    cluster.datasets["d"] = dataset_service_pb2.Dataset(name="d", version=1)
    cluster.models["m"] = model_service_pb2.ModelVersion(name="m", version=1)
    for command in (("delete", "digits-1"), ("data", "delete", "d"), ("models", "delete", "m")):
        assert phalanx("--json", *command).json() == {}


def test_submit_gives_job_and_plan(phalanx, cluster, tmp_path):
    file = tmp_path / "job.yaml"
    file.write_text("name: digits\ndata: {name: digits}\n")
    shown = phalanx("--json", "submit", str(file)).json()
    assert set(shown) == {"job", "plan"}
    assert shown["plan"]["steps"] == 10
    assert shown["job"]["spec"]["name"] == "digits"


def test_dry_run_gives_job_and_plan_and_submits_nothing(phalanx, cluster, tmp_path):
    file = tmp_path / "job.yaml"
    file.write_text("name: digits\n")
    shown = phalanx("--json", "submit", str(file), "--dry-run").json()
    assert set(shown) == {"job", "plan"}
    assert cluster.requests("SubmitJob")[0].validate_only
    assert not cluster.jobs


def test_watch_is_one_object_per_line(phalanx, cluster, job):
    ended = job_pb2.Job()
    ended.CopyFrom(job)
    ended.state = job_pb2.Job.STATE_SUCCEEDED
    cluster.watch_script.extend(
        [
            job_service_pb2.WatchJobResponse(event=job_pb2.Event(sequence=BIG, type="JOB_STARTED")),
            job_service_pb2.WatchJobResponse(progress=job_pb2.Progress(step=1)),
            job_service_pb2.WatchJobResponse(job=ended),
        ]
    )
    outcome = phalanx("--json", "watch", "digits-1")
    assert outcome.code == 0
    assert [list(line) for line in outcome.lines()] == [["job"], ["event"], ["progress"], ["job"]]
    assert outcome.lines()[1]["event"]["sequence"] == BIG


def test_events_and_logs_are_one_object_per_line(phalanx, cluster, job):
    cluster.events = [
        job_pb2.Event(sequence=1, type="WORKER_LOST", job_id="digits-1", shard=0, step=7),
        job_pb2.Event(sequence=2, type="RECOVERED", job_id="other"),
    ]
    cluster.logs = [job_service_pb2.ReadJobLogsResponse(worker_id="w", step=4, text="hello")]
    events = phalanx("--json", "events", "--job", "digits-1").lines()
    assert [(event["type"], event["shard"], event["step"]) for event in events] == [
        ("WORKER_LOST", 0, 7)
    ]
    assert phalanx("--json", "logs", "digits-1").lines()[0]["text"] == "hello"


def test_metrics_and_their_csv(phalanx, cluster, job):
    cluster.points = [
        job_pb2.MetricPoint(step=1, name="train/loss", value=0.5),
        job_pb2.MetricPoint(step=1, name="test/loss", value=0.25),
        job_pb2.MetricPoint(step=2, name="train/loss", value=0.125),
    ]
    shown = phalanx("--json", "metrics", "digits-1").json()
    assert [point["value"] for point in shown["points"]] == [0.5, 0.25, 0.125]
    assert shown["next_page_token"] == ""
    assert phalanx("metrics", "digits-1", "--csv").out == (
        "step,test/loss,train/loss\n1,0.25,0.5\n2,,0.125\n"
    )


def test_workers_status_and_gc(phalanx, cluster):
    worker = cluster_service_pb2.Worker(
        id="worker-1", state=cluster_service_pb2.Worker.STATE_READY, resident_bytes=BIG
    )
    cluster.cluster.workers.append(worker)
    cluster.garbage = storage_service_pb2.CollectGarbageResponse(bytes_removed=BIG, blobs_kept=3)
    shown = phalanx("--json", "workers").json()["workers"][0]
    assert (shown["state"], shown["resident_bytes"]) == ("STATE_READY", BIG)
    status = phalanx("--json", "status").json()
    assert set(status) == {"address", "cluster", "local"}
    assert status["local"] is None
    assert status["cluster"]["workers"][0]["id"] == "worker-1"
    assert phalanx("--json", "gc", "--dry-run").json()["bytes_removed"] == BIG
    assert cluster.requests("CollectGarbage")[0].dry_run


def test_doctor(offline):
    outcome = offline("--json", "doctor")
    shown = outcome.json()
    assert {"healthy", "checks"} == set(shown)
    assert {"name", "state", "message", "advice"} == set(shown["checks"][0])
    assert {"python", "grpcio", "memory", "disk", "cluster"} <= {c["name"] for c in shown["checks"]}
    assert outcome.code == (0 if shown["healthy"] else 6)
