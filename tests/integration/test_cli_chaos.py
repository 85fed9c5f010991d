"""`phalanx chaos` against a real cluster whose job has leaves that take a while."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import psutil
import pytest

import phalanx
from phalanx.cli.main import run
from phalanx.testing.arena import GUARD_S, Gate, add_blobs, unhurried_job, wait_until

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chaos")
    os.environ["PHALANX_TEST_GATE"] = str(folder)
    with phalanx.LocalCluster(
        workers=2, slots=1, state=folder / "state", environment={"PHALANX_TEST_LEAF_S": "0.01"}
    ) as local:
        add_blobs(local)
        yield local


@pytest.fixture
def cli(cluster, capfd):
    def call(*arguments):
        capfd.readouterr()
        code = run(["--address", cluster.address, *arguments])
        return code, *capfd.readouterr()

    return call


def _stopped(cluster):
    return [
        member.id
        for member in cluster.processes()
        if member.pid and psutil.Process(member.pid).status() == psutil.STATUS_STOPPED
    ]


def test_faults_cost_time_and_nothing_else(cluster, cli):
    before = {member.id: member.restarts for member in cluster.processes()}
    job = cluster.submit(unhurried_job(150))
    code, out, err = cli(
        *("--json", "chaos", "--job", job.id, "--state", str(cluster.state_dir)),
        *("--every", "2s", "--for", "4s", "--baseline", "2s", "--verify"),
        *("--fault", "kill-worker", "--fault", "kill-control"),
    )
    assert code == 0, err
    report = json.loads(out)
    assert {each["fault"] for each in report["faults"]} == {"kill-worker", "kill-control"}
    assert report["bit_identical"] is True
    assert report["parameters_sha256"] == cluster.get(job.id).result.parameters_sha256
    assert (report["examples_lost"], report["examples_doubled"]) == (0, 0)
    assert report["goodput"] > 0
    for each in report["faults"]:
        assert cluster.process(each["victim"]).restarts == before[each["victim"]] + 1
    victims = {each["victim"] for each in report["faults"] if each["fault"] == "kill-worker"}
    events = list(cluster.events())
    lost = {(each.worker_id, each.incident_id) for each in events if each.type == "WORKER_LOST"}
    moved = Counter()
    for each in events:
        if each.type == "SHARDS_MOVED" and each.job_id == job.id:
            moved[each.incident_id] += int(each.details["shards"])
    held = {worker for worker, incident in lost if moved[incident]}
    assert victims, "no worker was killed"
    assert victims <= held, "a worker was killed that had nothing to do"


def test_a_job_that_does_not_go_on_is_not_called_recovered(cluster, cli, monkeypatch):
    monkeypatch.setattr("phalanx.chaos.run.SETTLE_S", 5.0)
    monkeypatch.setattr("phalanx.chaos.run.SETTLE_GAPS", 0)
    gate = Gate(Path(os.environ["PHALANX_TEST_GATE"]))
    job = cluster.submit(unhurried_job(100_000))
    wait_until(lambda: job.refresh().progress.step, "the first step")
    gate.hold()
    try:
        wait_until(gate.entered, "a leaf that is held")
        code, out, err = cli(
            *("chaos", "--job", job.id, "--state", str(cluster.state_dir), "--baseline", "0s"),
            *("--every", "1s", "--for", "1s", "--fault", "kill-worker", "--verify"),
        )
    finally:
        gate.release()
    assert code == 1, err
    assert "NOT RECOVERED" in out
    assert "not recovered" in out
    assert "fewer than 3 steps were committed" in err
    job.cancel()
    wait_until(lambda: job.refresh().done, "the job to end")


def test_ctrl_c_shows_what_there_is_and_continues_what_is_paused(cluster):
    job = cluster.submit(unhurried_job(100_000))
    arguments = ["--address", cluster.address, "chaos", "--job", job.id, "--baseline", "0s"]
    arguments += ["--state", str(cluster.state_dir), "--fault", "pause-worker", "--for", "10m"]
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "phalanx.cli", *arguments],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            wait_until(lambda: _stopped(cluster), "a paused worker")
            process.send_signal(signal.SIGINT)
            out, _ = process.communicate(timeout=GUARD_S)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "pause-worker" in out
    assert max(map(len, out.splitlines())) <= 80
    assert not _stopped(cluster)
    job.cancel()
    wait_until(lambda: job.refresh().done, "the job to end")


def test_without_a_job_or_with_a_wrong_word_nothing_is_harmed(cluster, cli):
    pids = {member.id: member.pid for member in cluster.processes()}
    state = ("--state", str(cluster.state_dir))
    assert cli("chaos", *state, "--fault", "meteor")[0] == 2
    assert cli("chaos", *state, "--every", "soon")[0] == 2
    code, _, err = cli("chaos", *state, "--every", "3s", "--for", "1s")
    assert (code, "no fault would happen" in err) == (2, True)
    assert cli("chaos", *state, "--job", "no-such-job")[0] == 3
    code, _, err = cli("chaos", *state)
    assert (code, "no job runs" in err) == (6, True)
    assert {member.id: member.pid for member in cluster.processes()} == pids


def test_without_the_state_folder_only_workers_and_aggregators_can_be_found(cluster, cli, tmp_path):
    job = cluster.submit(unhurried_job(100_000))
    wait_until(lambda: job.refresh().progress.step, "the first step")
    code, _, err = cli("chaos", "--state", str(tmp_path), "--fault", "kill-storage")
    assert code == 6
    assert "--state" in err
    lost = sum(event.type == "WORKER_LOST" for event in cluster.events())
    code, out, err = cli(
        *("--json", "chaos", "--state", str(tmp_path), "--baseline", "0s"),
        *("--every", "1s", "--for", "1s", "--seed", "1"),
    )
    assert code == 0, err
    (fault,) = json.loads(out)["faults"]
    assert fault["fault"] == "kill-worker"
    assert sum(event.type == "WORKER_LOST" for event in cluster.events()) == lost + 1
    job.cancel()
    wait_until(lambda: job.refresh().done, "the job to end")
