"""Ctrl-C in what follows a job: it is left as it is, and people are told how to come back."""

import sys

import pytest

from phalanx import plotting
from phalanx.cli import entry
from phalanx.cli.commands import jobs
from phalanx.errors import Unavailable
from phalanx.sdk.cluster import Cluster
from phalanx.sdk.job import Job
from phalanx.v1 import job_pb2

HOW = "attach again with: phalanx --address {} watch digits-1"


def interrupted(*_arguments, **_options):
    raise KeyboardInterrupt


@pytest.fixture
def watched(cluster, monkeypatch):
    """A job that runs; whoever follows it is interrupted."""

    def follow(self, after_sequence=0):
        raise KeyboardInterrupt
        yield

    cluster.jobs["digits-1"] = job_pb2.Job(id="digits-1", state=job_pb2.Job.STATE_RUNNING)
    cluster.points = [
        job_pb2.MetricPoint(step=step, name="train/loss", value=1 / step) for step in (1, 2, 3)
    ]
    monkeypatch.setattr(Job, "watch_messages", follow)
    return cluster


def test_watch_says_how_to_attach_again_to_the_same_cluster(phalanx, watched):
    outcome = phalanx("watch", "digits-1")
    assert outcome.code == 130
    assert HOW.format(watched.address) in outcome.err
    assert outcome.err.count("attach") == 1


def test_train_does_not_promise_a_cluster_that_ends_with_it(
    phalanx, watched, tmp_path, monkeypatch
):
    file = tmp_path / "job.yaml"
    file.write_text("name: digits\n")
    assert " watch " in phalanx("train", str(file)).err
    # The cluster of the test stands for one that `train` started itself.
    monkeypatch.setattr("phalanx.local.cluster.LocalCluster", Cluster)
    outcome = phalanx("train", str(file), "--state", "here")
    assert outcome.code == 130
    assert "attach" not in outcome.err
    assert "phalanx up --state here" in outcome.err


@pytest.mark.parametrize("command", ["watch", "train"])
def test_the_curves_so_far_are_written(command, phalanx, watched, tmp_path):
    job_file, picture = tmp_path / "job.yaml", tmp_path / "curves.png"
    job_file.write_text("name: digits\n")
    what = "digits-1" if command == "watch" else str(job_file)
    outcome = phalanx(command, what, "--plot", str(picture))
    assert outcome.code == 130
    assert f"curves written to {picture}" in outcome.err
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_curves_that_cannot_be_fetched_are_told(phalanx, watched, tmp_path):
    picture = tmp_path / "curves.png"
    watched.fail("ListJobMetrics", *[Unavailable("storage is away", retry_after_s=0)] * 99)
    outcome = phalanx("--timeout", "1", "watch", "digits-1", "--plot", str(picture))
    assert outcome.code == 130
    assert HOW.format(watched.address).removesuffix("watch digits-1") in outcome.err
    assert f"{picture} is not written: " in outcome.err
    assert not picture.exists()


def test_a_picture_that_cannot_be_written_is_told(phalanx, watched, tmp_path):
    picture = tmp_path / "curves.png"
    picture.mkdir()
    outcome = phalanx("watch", "digits-1", "--plot", str(picture))
    assert outcome.code == 130
    assert f"{picture} is not written: cannot use" in outcome.err
    assert list(tmp_path.iterdir()) == [picture]


def test_without_measurements_an_older_picture_is_left_alone(phalanx, watched, tmp_path):
    picture = tmp_path / "curves.png"
    picture.write_bytes(b"older")
    watched.points = []
    outcome = phalanx("watch", "digits-1", "--plot", str(picture))
    assert outcome.code == 130
    assert f"nothing has been measured; {picture} is not written" in outcome.err
    assert picture.read_bytes() == b"older"


def test_a_second_one_leaves_without_the_curves(phalanx, watched, tmp_path, monkeypatch):
    picture = tmp_path / "curves.png"
    monkeypatch.setattr(plotting, "plot_curves", interrupted)
    outcome = phalanx("watch", "digits-1", "--plot", str(picture))
    assert outcome.code == 130
    assert outcome.err.count("attach") == 1
    assert f"{picture} is not written" in outcome.err
    assert not picture.exists()


@pytest.mark.parametrize("moment", ["settings_of", "get", "require_plot"])
def test_before_it_is_attached_watch_says_how_to_come_back(
    moment, phalanx, cluster, tmp_path, monkeypatch
):
    cluster.jobs["digits-1"] = job_pb2.Job(id="digits-1", state=job_pb2.Job.STATE_RUNNING)
    owner = {"settings_of": jobs, "get": Cluster, "require_plot": plotting}[moment]
    monkeypatch.setattr(owner, moment, interrupted)
    line = ["watch", "digits-1", "--plot", str(tmp_path / "the curves.png")]
    outcome = phalanx(*line)
    assert outcome.code == 130
    how = f"phalanx --address {cluster.address} watch digits-1 --plot '{line[-1]}'"
    assert f"attach with: {how}\n" in outcome.err


@pytest.mark.parametrize(
    "line", [("jobs",), ("watch",), ("show", "digits-1"), ("data", "show", "watch")]
)
def test_other_commands_have_nothing_to_come_back_to(line, offline, monkeypatch):
    monkeypatch.setattr("phalanx.cli.main.app", interrupted)
    outcome = offline(*line)
    assert (outcome.code, outcome.err) == (130, "")


class Interrupting:
    """Stands for the moment in which the rest of the program is being loaded."""

    def __init__(self, name):
        self.name = name

    def find_spec(self, name, path=None, target=None):
        if name == self.name:
            raise KeyboardInterrupt


def interrupted_within_a_class(*_arguments, **_options):
    class Named:
        def __set_name__(self, owner, name):
            raise KeyboardInterrupt

    # Python 3.11 makes a RuntimeError of it.
    type("Owner", (), {"attribute": Named()})


def test_an_import_that_makes_an_error_of_it_is_no_defect(phalanx, cluster, monkeypatch):
    monkeypatch.setattr(Cluster, "get", interrupted_within_a_class)
    outcome = phalanx("watch", "digits-1")
    assert outcome.code == 130
    assert f"attach with: phalanx --address {cluster.address} watch digits-1\n" in outcome.err


def test_while_the_program_is_loaded_watch_says_how_to_come_back(monkeypatch, capsys):
    import phalanx.cli

    name = "phalanx.cli.main"
    monkeypatch.setattr(sys, "argv", ["phalanx", "watch", "digits-1"])
    monkeypatch.setattr(sys, "meta_path", [Interrupting(name), *sys.meta_path])
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(phalanx.cli, "main")
    with pytest.raises(SystemExit) as ended:
        entry.main()
    assert ended.value.code == 130
    assert "attach with: phalanx watch digits-1" in capsys.readouterr().err
