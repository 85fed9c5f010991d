"""The command line and the Python interface against a real cluster of real processes."""

import asyncio
import csv
import json
import os
import select
import signal
import socket
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest

import phalanx
from phalanx.cli.main import run
from phalanx.models.code import deactivate_user_code
from phalanx.testing.arena import Arena, Gate, gated_job
from phalanx.testing.stores import EmbeddedKept
from phalanx.testing.wheels import make_wheel
from tests.integration.real_processes import alive, wait_for, write_kinds

GUARD_S = 120.0

wait_until = partial(wait_for, guard_s=GUARD_S)

JOB = """
name: iris
data: {name: iris, shards: 4}
train:
  model: {softmax_regression: {}}
  optimizer: {adam: {learning_rate: 0.1}}
  batch_size: 64
  stop: {steps: 40}
  evaluation: {every_steps: 10}
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CSV with numbers and words and the job that trains on it."""
    path = tmp_path_factory.mktemp("a folder with spaces")
    write_kinds(path / "iris.csv")
    (path / "job.yaml").write_text(JOB)
    return path


@pytest.fixture(scope="module")
def cluster(folder):
    gate = {"PHALANX_TEST_GATE": str(folder)}
    with phalanx.LocalCluster(workers=2, state=folder / "state", environment=gate) as local:
        yield local


@pytest.fixture
def cli(cluster, folder, capfd, monkeypatch):
    monkeypatch.setenv("PHALANX_CACHE", str(folder / "cache"))
    monkeypatch.chdir(folder)

    def call(*arguments):
        capfd.readouterr()
        code = run(["--address", cluster.address, *arguments])
        return code, *capfd.readouterr()

    return call


@pytest.fixture(scope="module")
def result(cluster, folder):
    cluster.data.add("iris", folder / "iris.csv", target="kind", test=0.25)
    return cluster.submit(folder / "job.yaml").wait(timeout_s=GUARD_S)


def test_processes_are_distinct_and_really_run(cluster):
    pids = [process.pid for process in cluster.processes()]
    assert len(set(pids)) == 5
    assert os.getpid() not in pids
    assert all(psutil.pid_exists(pid) for pid in pids)


def test_data_train_and_predict_from_the_command_line(cli, folder):
    code, out, err = cli("data", "add", "flowers", "iris.csv", "--target", "kind", "--test", "0.25")
    assert (code, out) == (0, "flowers@1\n"), err
    sets = ("--set", "data.name=flowers", "--set", "name=flowers")
    code, out, err = cli("submit", "job.yaml", *sets)
    assert code == 0, err
    job_id = out.strip()
    code, out, err = cli("watch", job_id, "--plot", "curves.png")
    assert code == 0, err
    assert "flowers@1" in out
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    code, out, err = cli("predict", "flowers", "iris.csv", "-o", "predictions.csv")
    assert code == 0, err
    with (folder / "predictions.csv").open() as file:
        predicted = [row["prediction"] for row in csv.DictReader(file)]
    with (folder / "iris.csv").open() as file:
        wanted = [row["kind"] for row in csv.DictReader(file)]
    assert np.mean(np.array(predicted) == np.array(wanted)) > 0.9
    code, out, _ = cli("verify", job_id)
    assert (code, "equal" in out) == (0, True)
    assert "ledger        balances" in out
    code, out, _ = cli("--json", "show", job_id)
    assert json.loads(out)["state"] == "STATE_SUCCEEDED"
    code, out, _ = cli("metrics", job_id, "--csv")
    rows = list(csv.DictReader(out.splitlines()))
    assert rows[-1]["step"] == "40"
    assert float(rows[-1]["test/accuracy"]) > 0.9
    code, out, _ = cli("--json", "events", "--job", job_id)
    types = [json.loads(line)["type"] for line in out.splitlines()]
    assert types[0] == "JOB_QUEUED"
    assert "JOB_SUCCEEDED" in types


def test_a_cluster_and_a_single_process_compute_the_same_bits(result, folder):
    with phalanx.LocalCluster(workers=0) as alone:
        alone.data.add("iris", folder / "iris.csv", target="kind", test=0.25)
        same = alone.submit(folder / "job.yaml").wait(timeout_s=GUARD_S)
    assert same.parameters_sha256 == result.parameters_sha256
    assert same.metrics == pytest.approx(result.metrics)


def test_everything_works_inside_a_notebook(cluster, folder):
    async def cell():
        # A notebook's cells run inside an event loop, which blocking calls must not mind.
        features = np.arange(60.0).reshape(30, 2)
        cluster.data.add("notebook", features, features[:, 0] > 30)
        spec = phalanx.load(folder / "job.yaml", sets=["data={name: notebook}", "name=notebook"])
        spec.train.ClearField("evaluation")
        job = cluster.submit(spec)
        steps = [update.step for update in job.watch()]
        labels = cluster.models.get(job.wait(timeout_s=GUARD_S).model).predict(features)
        return steps, labels

    steps, labels = asyncio.run(cell())
    assert steps[-1] == 40
    assert labels.tolist() == [False] * 16 + [True] * 14


WHEEL_JOB = """
name: mine
data: {name: iris, shards: 4}
code: {wheels: [%s]}
train:
  model: {custom: {entrypoint: "mine.net:Net"}}
  stop: {steps: 20}
"""
NET = """
import numpy as np
from mine.start import START
from phalanx.models import UserModel

class Net(UserModel):
    def __init__(self, schema):
        super().__init__(schema, {"w": (schema.features, schema.classes)})

    def initial(self, seed):
        return {"w": np.full((self.schema.features, self.schema.classes), START, np.float32)}

    def loss_and_gradients(self, parameters, features, targets):
        import mine.late
        error = features @ parameters["w"] - np.eye(self.schema.classes, dtype=np.float32)[targets]
        return float((error**2).sum()), {"w": features.T @ error * mine.late.TWO}

    def predictions(self, parameters, features):
        return features @ parameters["w"]
"""


def test_a_wheel_travels_with_its_job(cli, cluster, folder, result):
    files = {
        "mine/__init__.py": "",
        "mine/net.py": NET,
        "mine/start.py": "START = 0.25\n",
        "mine/late.py": "TWO = 2\n",
    }
    wheel = make_wheel(folder, files)
    code, out, _ = cli("code", "add", str(wheel))
    assert code == 0
    (folder / "wheel.yaml").write_text(WHEEL_JOB % out.strip())
    code, ended, err = cli("--json", "submit", "wheel.yaml", "--wait")
    assert code == 0, err
    ended = json.loads(ended)
    with phalanx.LocalCluster(workers=0) as local:
        local.data.add("iris", folder / "iris.csv", target="kind", test=0.25)
        digest = local.code.add(wheel).sha256
        assert digest == out.split()[0]
        alone = local.submit(folder / "wheel.yaml").wait(GUARD_S)
    assert alone.parameters_sha256 == ended["result"]["parameters_sha256"]
    assert cli("verify", ended["id"])[0] == 0
    assert "mine" not in sys.modules
    model = cluster.models.get("mine", allow_code=True)
    assert set(model.predict(folder / "iris.csv")) <= {"long", "short"}
    deactivate_user_code()
    caches = list((folder / "state").glob("cache/*/code"))
    assert caches
    wait_until(lambda: not any(list(cache.iterdir()) for cache in caches), "the code to be removed")


def test_a_wheel_that_was_never_added_is_refused(cli, cluster, folder, result):
    (folder / "wheel.yaml").write_text(WHEEL_JOB % ("a" * 64))
    for more in ([], ["--dry-run"]):
        code, _, err = cli("submit", "wheel.yaml", *more)
        assert code == 3
        assert "phalanx code add" in err
        assert "wheel.yaml:4: " in err
    # A blob that is stored but was not added as a wheel, such as a file of a model.
    blob = cluster.models.describe("iris").files[0].digest
    (folder / "wheel.yaml").write_text(WHEEL_JOB % blob)
    assert cli("submit", "wheel.yaml")[0] == 3


def test_models_can_be_listed_downloaded_and_exported(cli, folder, result):
    code, out, _ = cli("--json", "models", "list")
    assert "iris" in [model["name"] for model in json.loads(out)["models"]]
    code, out, err = cli("models", "get", "iris", "my-model")
    assert code == 0, err
    assert {file.name for file in (folder / "my-model").iterdir()} == {
        *("model.safetensors", "model.json", "README.md")
    }
    assert cli("models", "get", "iris", "my-model")[0] == 6
    for ending in ("zip", "npz", "safetensors", "onnx"):
        assert cli("models", "export", "iris", f"m.{ending}")[0] == 0
    code, _, err = cli("models", "export", "iris", "m.joblib")
    assert (code, "to_sklearn" in err) == (2, True)
    with zipfile.ZipFile(folder / "m.zip") as archive:
        assert "model.json" in archive.namelist()
    with np.load(folder / "m.npz") as arrays:
        assert sum(array.size for array in arrays.values()) == 8
    offline = run(["predict", "my-model", "iris.csv", "-o", "from-folder.parquet"])
    assert offline == 0
    assert (folder / "from-folder.parquet").stat().st_size > 0


def test_workers_status_and_drain(cli, cluster):
    code, out, _ = cli("status", "--state", str(cluster.state_dir))
    assert code == 0
    assert "2 ready" in out
    for process in cluster.processes():
        assert process.id in out
        assert str(process.pid) in out
        assert process.metrics_address in out
    added = cluster.add_worker()
    wait_until(lambda: state_of(cluster, added) == "STATE_READY", "the new worker is ready")
    code, _, err = cli("drain", added, "--wait")
    assert (code, "has left" in err) == (0, True)
    wait_until(lambda: added not in [p.id for p in cluster.processes()], "its process has ended")
    assert cli("drain", "nobody")[0] == 3


def test_a_killed_worker_comes_back_and_the_job_does_not_notice(cluster, folder, result):
    kept = EmbeddedKept(Path(cluster.state_dir) / "storage")
    ring = Arena(cluster, Gate(folder), kept)
    spec = {**gated_job(steps=40, shards=4), "name": "killed", "data": {"name": "iris"}}
    wanted = cluster.submit({**spec, "name": "quiet"}).wait(timeout_s=GUARD_S).parameters_sha256
    job = ring.submit(spec)
    killed, told = None, []
    try:
        caught = ring.caught_at(job, 3)[0]
        for update in job.watch():
            told += [event.type for event in update.events]
            if killed is None:
                killed = cluster.process(caught)
                os.kill(killed.pid, signal.SIGKILL)
            if "WORKER_LOST" in told:
                ring.gate.release()
    finally:
        ring.gate.release()
    assert killed is not None
    assert {"WORKER_LOST", "SHARDS_MOVED", "RECOVERED"} <= set(told)
    assert job.wait(timeout_s=GUARD_S).parameters_sha256 == wanted
    wait_until(lambda: cluster.process(killed.id).pid not in (0, killed.pid), "it is back")


def test_wrong_jobs_are_refused_with_line_and_reason(cli, folder, result):
    (folder / "wrong.yaml").write_text(JOB.replace("batch_size: 64", "batch_size: -64"))
    code, _, err = cli("submit", "wrong.yaml")
    assert code == 2
    assert "wrong.yaml:7: " in err
    assert "train.batch_size" in err
    code, _, err = cli("submit", "job.yaml", "--set", "data.name=nothing")
    assert code == 3
    code, _, err = cli("submit", "job.yaml", "--set", "train.privacy={clip_norm: 1.0}")
    assert code == 2
    assert "train.privacy" in err


def phalanx_command(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-P", "-m", "phalanx.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=GUARD_S,
        check=False,
        **options,
    )


@pytest.fixture
def own_state(tmp_path):
    """An environment for a cluster of its own; whatever still runs at the end is stopped."""
    environment = {**os.environ, "PHALANX_STATE": str(tmp_path / "state")}
    environment.pop("PHALANX_ADDRESS", None)
    yield environment
    phalanx_command("down", env=environment)


def test_up_status_and_down(own_state):
    ours, of_a_script = os.pipe()
    with open(ours, "rb") as reader:
        with open(of_a_script, "wb"):
            up = phalanx_command(
                *("--json", "up", "--detach", "--workers=1", "--port=0"),
                env=own_state,
                pass_fds=[of_a_script],
            )
        assert up.returncode == 0, up.stderr
        assert select.select([reader], [], [], GUARD_S)[0], "a cluster holds its starter's files"
    state = json.loads(up.stdout)
    pids = [state["pid"], *(process["pid"] for process in state["processes"])]
    assert len(set(pids)) == 5
    status = phalanx_command("--json", "status", env=own_state)
    assert status.returncode == 0, status.stderr
    assert json.loads(status.stdout)["local"]["pid"] == state["pid"]
    again = phalanx_command("up", "--detach", "--port=0", env=own_state)
    assert again.returncode == 6
    assert "already runs" in again.stderr
    down = phalanx_command("down", env=own_state)
    assert down.returncode == 0, down.stderr
    assert not alive(pids)
    assert phalanx_command("down", env=own_state).returncode == 3


def test_ctrl_c_leaves_nothing_behind(own_state):
    up = subprocess.Popen(
        [sys.executable, "-P", "-m", "phalanx.cli", "--json", "up", "--workers=1", "--port=0"],
        stdout=subprocess.PIPE,
        env=own_state,
        start_new_session=True,
    )
    try:
        pids = [process["pid"] for process in json.loads(up.stdout.readline())["processes"]]
        up.send_signal(signal.SIGINT)
        assert up.wait(GUARD_S) == 130
        assert not alive(pids)
    finally:
        up.kill()
        up.wait()
        up.stdout.close()


def test_a_killed_supervisor_leaves_nothing_behind(own_state):
    up = phalanx_command("--json", "up", "--detach", "--workers=2", "--port=0", env=own_state)
    state = json.loads(up.stdout)
    pids = [process["pid"] for process in state["processes"]]
    family = [child.pid for pid in pids for child in psutil.Process(pid).children(recursive=True)]
    assert family, "workers have leaf processes"
    os.kill(state["pid"], signal.SIGKILL)
    wait_until(lambda: not alive([*pids, *family]), "all processes have ended")


def test_a_port_in_use_is_told(own_state):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        up = phalanx_command("up", "--detach", f"--port={port}", env=own_state)
    assert up.returncode == 6
    assert f"port {port} is in use; give --port 0 or another" in up.stderr


def state_of(cluster, worker_id):
    from phalanx.v1.cluster_service_pb2 import Worker

    for worker in cluster.workers():
        if worker.id == worker_id:
            return Worker.State.Name(worker.state)
    return ""
