"""The verbs for what exists already, one after another, against a real cluster.

Each says what it did, and the cluster is asked whether that is so.
"""

import csv
import json
import re
from functools import partial

import pyarrow as pa
import pyarrow.parquet
import pytest

import phalanx
from phalanx.cli.main import run
from phalanx.errors import NotFound
from phalanx.sdk.methods import Method
from phalanx.v1.cluster_service_pb2 import Worker
from phalanx.v1.storage_service_pb2 import ListPinsRequest, ListPinsResponse
from tests.integration.real_processes import wait_for

GUARD_S = 120.0

wait_until = partial(wait_for, guard_s=GUARD_S)

LIST_PINS = Method("phalanx.v1.StorageService", "ListPins", ListPinsRequest, ListPinsResponse)

LONG = """
name: long
data: {name: numbers, shards: 4}
train:
  model: {logistic_regression: {}}
  optimizer: {sgd: {learning_rate: 0.1}}
  batch_size: 64
  stop: {steps: 1000000}
"""
# Fails until somebody has lit the oven.
BAKED = """
name: baked
data: {{name: numbers, shards: 2}}
train:
  model: {{custom: {{entrypoint: "baking:Bread"}}}}
  stop: {{steps: 5}}
code:
  files:
    baking.py: |
      from pathlib import Path

      import numpy as np
      from phalanx.models import UserModel

      class Bread(UserModel):
          def __init__(self, schema):
              super().__init__(schema, {{"w": (schema.features, schema.classes)}})

          def initial(self, seed):
              return {{"w": np.zeros((self.schema.features, self.schema.classes), np.float32)}}

          def loss_and_gradients(self, parameters, features, targets):
              print(f"{{len(targets)}} loaves")
              # Not yet at the start, where a leaf is tried before the job begins.
              if parameters["w"].any() and not Path({oven!r}).exists():
                  raise ValueError("the oven is cold")
              wanted = np.eye(self.schema.classes, dtype=np.float32)[targets]
              error = features @ parameters["w"] - wanted
              return float((error**2).sum()), {{"w": features.T @ error}}

          def predictions(self, parameters, features):
              return features @ parameters["w"]
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def loaded(loaded_code):
    """The cluster starts from code that is loaded already."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("verbs")
    with (path / "numbers.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["number", "kind"])
        for number in range(-200, 200):
            writer.writerow([f"{number / 100:.2f}", "neg" if number < 0 else "pos"])
    (path / "long.yaml").write_text(LONG)
    (path / "baked.yaml").write_text(BAKED.format(oven=str(path / "oven")))
    return path


@pytest.fixture(scope="module")
def cluster(folder):
    # Whatever nothing refers to is garbage at once, but only when somebody asks for it to be taken.
    garbage = {"PHALANX_STORAGE_GC_GRACE_S": "0", "PHALANX_STORAGE_GC_INTERVAL_S": "0"}
    state, roots = folder / "state", [folder]
    with phalanx.LocalCluster(
        2, slots=1, state=state, link_roots=roots, environment=garbage
    ) as local:
        wait_until(lambda: len(local.workers()) == 2, "both workers to join")
        yield local


@pytest.fixture
def cli(cluster, folder, capfd, monkeypatch):
    monkeypatch.setenv("PHALANX_CACHE", str(folder / "cache"))
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.chdir(folder)

    def call(*arguments, code=0, remark=False):
        """Return what was written: the error of a code, and the remark where nothing else is."""
        capfd.readouterr()
        exit_code = run(["--address", cluster.address, *arguments])
        out, err = capfd.readouterr()
        assert exit_code == code, err
        return err if code or remark else out

    return call


@pytest.fixture
def numbers(cluster, folder):
    try:
        return cluster.data.get("numbers")
    except NotFound:
        return cluster.data.add("numbers", folder / "numbers.csv", target="kind", test=0.25)


def test_pause_resume_and_cancel(cli, cluster, numbers):
    job_id = cli("submit", "long.yaml").strip()
    job = cluster.get(job_id)
    wait_until(lambda: job.refresh().progress.step > 0, "it runs")
    assert re.match(rf"{job_id} +RUNNING ", line_of(cli("jobs"), job_id))
    assert job_id in cli("jobs", "--state", "running")
    assert job_id not in cli("jobs", "--state", "paused")
    cli("pause", job_id)
    wait_until(lambda: job.refresh().state == "PAUSED", "it is paused")
    paused_at = job.progress.step
    assert job.message.progress.checkpoint_step == paused_at
    assert re.search(r"state +PAUSED", cli("show", job_id))
    assert job_id in cli("jobs", "--state", "paused")
    cli("retry", job_id, code=6)
    cli("delete", job_id, code=6)
    cli("resume", job_id)
    wait_until(lambda: job.refresh().progress.step > paused_at, "it goes on")
    assert job.state == "RUNNING"
    resumed = [event for event in cluster.events(job_id) if event.type == "JOB_RESUMED"]
    assert [event.step for event in resumed] == [paused_at]
    told = json.loads(cli("--json", "cancel", job_id, "--reason", "seen enough"))
    assert told["id"] == job_id
    wait_until(lambda: job.refresh().done, "it has ended")
    assert "seen enough" in cli("watch", job_id, code=1)
    assert re.match(rf"{job_id} +CANCELLED ", line_of(cli("jobs"), job_id))
    cli("resume", job_id, code=6)
    cli("delete", job_id)
    assert job_id not in cli("jobs")
    cli("show", job_id, code=3)
    cli("pause", job_id, code=3)


def test_a_failed_job_is_read_about_mended_and_retried(cli, cluster, folder, numbers):
    (folder / "oven").unlink(missing_ok=True)
    assert "the oven is cold" in cli("submit", "baked.yaml", "--wait", code=1)
    [job] = cluster.jobs("failed")
    letters = cli("jobs", "--dead-letters")
    assert re.search(rf"^{job.id} .*\n.*the oven is cold", letters, re.MULTILINE)
    assert re.search(r"worker-[01]", letters)
    wait_until(lambda: "ValueError: the oven is cold" in cli("logs", job.id), "the lines arrive")
    logs = cli("logs", job.id)
    assert "150 loaves" in logs
    lines = [json.loads(line) for line in cli("--json", "logs", job.id).splitlines()]
    speakers = {line["worker_id"] for line in lines}
    for worker in speakers:
        own = cli("--json", "logs", job.id, "--worker", worker).splitlines()
        assert {json.loads(line)["worker_id"] for line in own} == {worker}
    (folder / "oven").touch()
    cli("retry", job.id)
    followed = cli("logs", job.id, "-f")
    assert job.refresh().wait(GUARD_S).steps == 5
    assert followed.startswith(logs), "lines of the first try come first"
    assert followed.count("loaves") > logs.count("loaves")
    whole = logs.count("loaves") + 5 * 2
    wait_until(lambda: cli("logs", job.id).count("loaves") >= whole, "the last lines arrive")
    assert "no dead letters" in cli("jobs", "--dead-letters", remark=True)


def test_parquet_files_are_linked(cli, cluster, folder):
    table = pa.table({"x": [1.0, 2.0] * 200, "kind": ["neg", "pos"] * 200})
    for number in range(12):
        pyarrow.parquet.write_table(table, folder / f"part-{number:02}.parquet")
    files = [f"part-{number:02}.parquet" for number in range(12)]
    assert ", linked" in cli("data", "add", "parts", *files, "--link", remark=True)
    shown = cli("data", "show", "parts")
    assert re.search(rf"linked +{folder}/part-00.parquet \(.*\)\n +{folder}/part-01", shown)
    assert "… and 2 more files" in shown
    assert re.search(r"parts@1 .*, linked", cli("data", "list"))
    assert json.loads(cli("--json", "data", "show", "parts"))["linked"]
    cli("submit", "long.yaml", "--set", "train.stop.steps=20", "--set", "data.name=parts", "--wait")
    (outside := folder.parent / "outside.parquet").write_bytes((folder / files[0]).read_bytes())
    refusal = cli("data", "add", "others", str(outside), "--link", code=6)
    assert f"{outside} lies in none of the folders" in refusal
    for job in cluster.jobs():
        cli("delete", job.id)
    cli("data", "delete", "parts")
    assert (folder / files[0]).exists()


def test_data_sets_are_shown_and_deleted_once_nobody_needs_them(cli, cluster, folder, numbers):
    shown = cli("data", "show", "numbers")
    for line in (r"name +numbers@1", r"classes +neg, pos", r"rows +test 100, train 300"):
        assert re.search(line, shown)
    assert json.loads(cli("--json", "data", "show", "numbers"))["target"] == "kind"
    cli("submit", "long.yaml", "--set", "train.stop.steps=20", "--wait")
    cluster.data.add("spare", folder / "numbers.csv", target="number", task="regression")
    kept = cluster.backend.get_blob(cluster.data.get("numbers").manifest_digest)
    gone = cluster.data.get("spare").manifest_digest
    cli("data", "delete", "spare")
    cli("data", "show", "spare", code=3)
    reader = cli("submit", "long.yaml").strip()
    assert reader in cli("data", "delete", "numbers", code=6)
    assert cluster.data.get("numbers").version == 1
    cli("cancel", reader)
    cli("watch", reader, code=1)
    # The manifest of the spare one and its chunk: nobody else has the other targets.
    would = json.loads(cli("--json", "gc", "--dry-run"))
    assert would["blobs_removed"] >= 2
    assert cluster.backend.get_blob(gone)
    did = json.loads(cli("--json", "gc"))
    assert did["blobs_removed"] == would["blobs_removed"]
    assert did["bytes_removed"] == would["bytes_removed"] > 0
    with pytest.raises(NotFound):
        cluster.backend.get_blob(gone)
    assert json.loads(cli("--json", "gc"))["blobs_removed"] == 0
    assert cluster.backend.get_blob(cluster.data.get("numbers").manifest_digest) == kept
    assert cli("predict", "long", "numbers.csv").splitlines()[0].startswith("prediction")
    cli("models", "delete", "long")
    cli("models", "show", "long", code=3)
    for job in cluster.jobs():
        cli("delete", job.id)
    cli("data", "delete", "numbers")
    assert "no data sets yet" in cli("data", "list", remark=True)


def test_what_finished_jobs_used_goes_by_force_and_verify_says_so(cli, cluster, folder):
    cluster.data.add("spent", folder / "numbers.csv", target="kind", test=0.25)
    sets = ("--set", "train.stop.steps=20", "--set", "data.name=spent")
    first = cli("submit", "long.yaml", *sets, "--set", "output.model=one", "--wait").split()[0]
    more = ("--set", "output.model=two", "--set", "train.start.model=one")
    second = cli("submit", "long.yaml", *sets, *more, "--wait").split()[0]
    wait_until(lambda: not {first, second} & pin_holders(cluster), "their ends are noted")
    refused = cli("data", "delete", "spent", code=6)
    assert first in refused
    assert second in refused
    assert "--force" in refused
    assert second in cli("models", "delete", "one", code=6)
    cli("verify", second)
    cli("models", "delete", "one", "--force")
    cli("verify", second, code=6)
    counted = cluster.verify(second)
    assert counted.balanced
    assert counted.not_compared == "model one@1 is deleted, from which it started"
    cli("data", "delete", "spent", "--force")
    for job_id in (first, second):
        assert f"data set spent@1 is deleted, which job {job_id}" in cli("verify", job_id, code=6)
    assert cli("predict", "two", "numbers.csv").startswith("prediction")
    cli("models", "delete", "two")


def pin_holders(cluster):
    return set(cluster.backend.call(LIST_PINS, ListPinsRequest()).holders)


def test_workers_and_doctor(cli, cluster, folder):
    shown = cli("workers")
    for process in cluster.processes():
        if process.role == "worker":
            assert re.search(rf"^{process.id} +READY +1 +{process.pid} ", shown, re.MULTILINE)
    listed = json.loads(cli("--json", "workers"))["workers"]
    assert {Worker.State.Value(worker["state"]) for worker in listed} == {Worker.STATE_READY}
    checked = json.loads(cli("--json", "doctor", "--state", str(folder / "state")))
    assert checked["healthy"] is True
    [found] = [check for check in checked["checks"] if check["name"] == "cluster"]
    assert found["state"] == "ok"
    assert cluster.address in found["message"]
    assert "2 workers" in found["message"]


def line_of(table, job_id):
    [line] = [line for line in table.splitlines() if line.startswith(job_id)]
    return line
