import socket
import subprocess
import sys
import threading
from functools import partial
from types import SimpleNamespace

import pytest

import phalanx
from phalanx.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unavailable,
)
from phalanx.local.ports import free_ports
from phalanx.sdk.backend import reachable_address
from phalanx.sdk.discovery import resolve_addresses
from phalanx.testing.servers import ScriptedCluster
from phalanx.v1 import job_pb2, job_service_pb2

Watch = job_service_pb2.WatchJobResponse


@pytest.fixture
def script():
    with ScriptedCluster() as scripted:
        yield scripted


@pytest.fixture
def cluster(script):
    with phalanx.connect(script.address, timeout_s=10) as connected:
        yield connected


def job_in(script, state=job_pb2.Job.STATE_RUNNING, **fields):
    job = job_pb2.Job(id="digits-1", state=state, **fields)
    script.jobs[job.id] = job
    return job


@pytest.mark.parametrize("make", [partial(phalanx.connect, "127.0.0.1:1"), phalanx.LocalCluster])
def test_a_wrong_namespace_is_refused_at_once(make):
    with pytest.raises(InvalidArgument, match="namespace: 'a b' is not allowed") as caught:
        make(namespace="a b")
    assert [each.field for each in caught.value.violations] == ["namespace"]


def test_import_is_light():
    program = (
        "import sys, phalanx\n"
        "heavy = {'numpy', 'grpc', 'google.protobuf', 'typer', 'rich'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_public_name_exists():
    for name in phalanx.__all__:
        assert getattr(phalanx, name) is not None
    assert set(phalanx.__all__) <= set(dir(phalanx))
    with pytest.raises(AttributeError):
        _ = phalanx.nonsense


def test_a_call_moves_on_to_the_next_address(script):
    dead = f"127.0.0.1:{free_ports(1)[0]}"
    with phalanx.connect(f"{dead},{script.address}") as cluster:
        assert cluster.describe().leader == "control-1"
        assert cluster.address == script.address


def test_a_silent_address_is_left_for_the_next(script, monkeypatch):
    """A stopped process keeps its sockets open and says nothing."""
    monkeypatch.setattr("phalanx.sdk.transport.SILENCE_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        addresses = f"127.0.0.1:{mute.getsockname()[1]},{script.address}"
        with phalanx.connect(addresses) as cluster:
            assert cluster.describe().leader == "control-1"
            assert cluster.address == script.address
        alone = phalanx.connect(addresses.partition(",")[0], timeout_s=0.5)
        with alone, pytest.raises(DeadlineExceeded):
            alone.describe()


def test_a_retry_carries_the_same_request_id(script, cluster):
    script.fail("SubmitJob", Unavailable("no leader", reason="NO_LEADER", retry_after_s=0.01))
    cluster.submit({"name": "digits"})
    first, second = script.requests("SubmitJob")
    assert first.request_id == second.request_id
    assert first.request_id
    cluster.submit({"name": "digits"})
    assert script.requests("SubmitJob")[2].request_id != first.request_id


@pytest.mark.parametrize("verb", ["cancel", "pause", "resume", "retry", "delete"])
def test_every_change_of_a_job_carries_a_request_id(script, cluster, verb):
    job_in(script)
    getattr(cluster.get("digits-1"), verb)()
    assert script.requests(f"{verb.title()}Job")[0].request_id


def test_what_is_wrong_is_not_retried(script, cluster):
    with pytest.raises(NotFound):
        cluster.get("nobody")
    assert len(script.requests("GetJob")) == 1


def test_watch_yields_progress_with_the_events_before_it(script, cluster):
    job_in(script)
    done = job_pb2.Job(id="digits-1", state=job_pb2.Job.STATE_SUCCEEDED)
    done.progress.step = 2
    script.watch_script.extend(
        [
            Watch(event=job_pb2.Event(sequence=1, type="JOB_STARTED")),
            Watch(progress=job_pb2.Progress(step=0)),
            Watch(progress=job_pb2.Progress(step=1, metrics={"train/loss": 0.5})),
            Watch(event=job_pb2.Event(sequence=2, type="WORKER_LOST", shard=0)),
            Watch(job=done),
        ]
    )
    first, last = cluster.get("digits-1").watch()
    assert (first.step, first.metrics["train/loss"]) == (1, 0.5)
    assert first.metrics["test/accuracy"] != first.metrics["test/accuracy"]
    assert [event.type for event in first.events] == ["JOB_STARTED"]
    assert (last.step, last.state) == (2, "SUCCEEDED")
    assert [(event.type, event.shard, event.step) for event in last.events] == [
        ("WORKER_LOST", 0, None)
    ]


def test_watch_attaches_again_after_the_last_event_it_saw(script, cluster):
    job_in(script)
    script.watch_script.extend(
        [
            Watch(event=job_pb2.Event(sequence=7, type="JOB_STARTED")),
            Unavailable("going down", reason="SHUTTING_DOWN", retry_after_s=0.01),
            Watch(event=job_pb2.Event(sequence=8, type="RECOVERED")),
            Watch(job=job_pb2.Job(id="digits-1", state=job_pb2.Job.STATE_SUCCEEDED)),
        ]
    )
    messages = list(cluster.get("digits-1").watch_messages())
    seen = [item.event.sequence for item in messages if item.HasField("event")]
    assert seen == [7, 8]
    assert [request.after_sequence for request in script.requests("WatchJob")] == [0, 7]


def test_watch_survives_a_restart_of_the_server(script):
    job_in(script)
    with phalanx.connect(script.address) as cluster:
        job = cluster.get("digits-1")
        script.stop()
        with ScriptedCluster(listen=script.address) as again:
            again.jobs["digits-1"] = job_pb2.Job(id="digits-1", state=job_pb2.Job.STATE_SUCCEEDED)
            assert [update.state for update in job.watch()] == ["SUCCEEDED"]


@pytest.fixture
def told_by_two(script):
    """A job that has ended under the second address; the first is a leader that was replaced."""
    with ScriptedCluster() as old:
        job_in(old, generation=1)
        job_in(script, job_pb2.Job.STATE_SUCCEEDED, generation=2)
        with phalanx.connect(f"{old.address},{script.address}", timeout_s=10) as cluster:
            job = cluster.get("digits-1")
            assert job.state == "RUNNING"
            yield old, job


def test_what_an_older_leader_tells_does_not_undo_what_is_known(told_by_two, script):
    old, job = told_by_two
    old.fail("GetJob", Unavailable("busy"))
    assert job.refresh().state == "SUCCEEDED"
    job._backend._control._current = 0
    assert job.refresh().state == "SUCCEEDED"
    assert [len(each.requests("GetJob")) for each in (old, script)] == [3, 2]


def test_a_watch_leaves_an_older_leader(told_by_two):
    old, job = told_by_two
    old.fail("GetJob", Unavailable("busy"))
    job.refresh()
    job._backend._control._current = 0
    assert [update.state for update in job.watch()] == ["SUCCEEDED"]
    assert len(old.requests("WatchJob")) == 1


def test_where_only_an_older_leader_answers_the_call_says_so(told_by_two, script, monkeypatch):
    old, job = told_by_two
    old.fail("GetJob", Unavailable("busy"))
    job.refresh()
    script.stop()
    monkeypatch.setattr("phalanx.sdk.transport.AWAY_S", 0.0)
    with pytest.raises(Unavailable, match=r"tells less than was known already|cannot reach"):
        job.refresh()
    assert job.state == "SUCCEEDED"


CUT_OFF = "this control process has not reached storage"


@pytest.fixture
def cut_off():
    """A leader that knows one job and one event, and not whether another one leads."""
    with ScriptedCluster() as old:
        job_in(old, generation=1)
        old.events = [job_pb2.Event(sequence=1, type="JOB_QUEUED")]
        old.incomplete = CUT_OFF
        yield old


def test_a_list_that_may_not_be_whole_is_asked_of_another_address(script, cut_off):
    script.jobs["digits-2"] = job_pb2.Job(id="digits-2", state=job_pb2.Job.STATE_QUEUED)
    job_in(script, generation=2)
    script.events = [job_pb2.Event(sequence=each, type="JOB_QUEUED") for each in (1, 2)]
    with phalanx.connect(f"{cut_off.address},{script.address}") as cluster:
        found = cluster.jobs()
        assert ({job.id for job in found}, found.incomplete) == ({"digits-1", "digits-2"}, "")
        cluster.backend._control._current = 0
        assert [event.sequence for event in cluster.events()] == [1, 2]
    assert len(cut_off.requests("ListJobs")) == len(cut_off.requests("ListEvents")) == 1


def test_workers_come_newest_first_whatever_the_order_of_pages(script, cluster):
    for name, joined_s in (("w1", 20), ("w2", 30), ("w3", 10)):
        script.cluster.workers.add(id=name).join_time.FromSeconds(joined_s)
    assert [worker.id for worker in cluster.workers()] == ["w2", "w1", "w3"]


def test_a_list_that_nobody_knows_whole_comes_with_a_warning(cut_off, monkeypatch):
    # Time goes on while nobody is asked, and not while the machine is busy.
    slept_s = []
    clock = SimpleNamespace(monotonic=lambda: sum(slept_s), sleep=slept_s.append)
    monkeypatch.setattr("phalanx.sdk.following.time", clock)
    with phalanx.connect(cut_off.address) as cluster:
        for ask in (cluster.jobs, cluster.workers, cluster.get("digits-1").metrics):
            with pytest.warns(phalanx.IncompleteWarning, match=CUT_OFF) as told:
                found = ask()
            assert [warning.filename for warning in told] == [__file__]
            assert found.incomplete == CUT_OFF
        events = cluster.events()
        assert next(events).sequence == 1
        with pytest.raises(Unavailable, match=CUT_OFF):
            next(events)
    assert len(cut_off.requests("ListEvents")) >= 2, "it is asked again before it is believed"


def test_events_wait_for_storage_that_is_being_restarted(cut_off):
    """The rest comes once control reaches it again; nothing comes twice."""
    with phalanx.connect(cut_off.address) as cluster:
        events = cluster.events()
        assert next(events).sequence == 1
        knows_again = threading.Timer(0.5, lambda: setattr(cut_off, "incomplete", ""))
        knows_again.start()
        assert list(events) == []
        knows_again.join()
    assert len(cut_off.requests("ListEvents")) >= 2


def test_a_list_goes_on_behind_what_came_when_its_leader_was_replaced(script, cluster):
    script.events = [job_pb2.Event(sequence=each, type="JOB_QUEUED") for each in (1, 2)]
    events = cluster.events()
    script.fail(
        "ListEvents", Unavailable("this control process leads no more", reason="NOT_LEADER")
    )
    assert [event.sequence for event in events] == [1, 2]
    assert len(script.requests("ListEvents")) == 2


def test_a_list_that_no_leader_gives_ends_with_what_was_said(script, cluster, monkeypatch):
    monkeypatch.setattr("phalanx.sdk.following.TAKE_OVER_S", 0.0)
    assert not cluster.jobs()
    script.fail(
        "ListEvents", Unavailable("this control process leads no more", reason="NOT_LEADER")
    )
    with pytest.raises(Unavailable, match="leads no more"):
        list(cluster.events())


def test_nobody_has_left_by_a_list_that_may_not_be_whole(cut_off):
    cut_off.cluster.workers.add(id="w1")
    with (
        phalanx.connect(cut_off.address) as cluster,
        pytest.warns(phalanx.IncompleteWarning),
        pytest.raises(DeadlineExceeded),
    ):
        cluster.drain("w1", timeout_s=0.0)


def test_watch_leaves_an_address_that_says_nothing(script, monkeypatch):
    monkeypatch.setattr("phalanx.sdk.job.WATCH_S", 0.2)
    job_in(script, job_pb2.Job.STATE_SUCCEEDED)
    with (
        socket.create_server(("127.0.0.1", 0)) as mute,
        phalanx.connect(script.address) as cluster,
        phalanx.connect(f"127.0.0.1:{mute.getsockname()[1]},{script.address}") as both,
    ):
        job = cluster.get("digits-1")
        job._backend = both.backend
        assert [update.state for update in job.watch()] == ["SUCCEEDED"]


def test_wait_asks_again_where_nobody_answered_in_time(script, cluster):
    job_in(script)
    job = cluster.get("digits-1")
    script.fail("GetJob", DeadlineExceeded("it was stopped for a while"))
    job_in(script, job_pb2.Job.STATE_SUCCEEDED, result=job_pb2.Result(model="digits@3"))
    assert job.wait().model == "digits@3"


def test_wait_gives_the_result(script, cluster):
    job_in(
        script,
        job_pb2.Job.STATE_SUCCEEDED,
        result=job_pb2.Result(model="digits@3", parameters_sha256="ff", metrics={"x": 1.0}),
    )
    result = cluster.get("digits-1").wait()
    assert (result.model, result.parameters_sha256, result.metrics) == (
        "digits@3",
        "ff",
        {"x": 1.0},
    )


def test_wait_raises_with_the_failures(script, cluster):
    failure = job_pb2.Failure(code="RAISED", message="bad label", shard=3, step=4)
    job_in(script, job_pb2.Job.STATE_FAILED, reason="POISON_SHARD", failures=[failure])
    with pytest.raises(phalanx.JobFailed, match="shard 3, step 4: bad label") as failed:
        cluster.get("digits-1").wait()
    assert failed.value.reason == "POISON_SHARD"
    assert failed.value.failures[0].shard == 3


def test_wait_ends_at_its_deadline_and_the_job_goes_on(script, cluster):
    job_in(script)
    with pytest.raises(DeadlineExceeded, match="goes on"):
        cluster.get("digits-1").wait(timeout_s=0.05)
    assert not script.requests("CancelJob")


def test_metrics_are_fetched_page_by_page(script, cluster, monkeypatch):
    monkeypatch.setattr("phalanx.sdk.job.METRIC_PAGE", 4)
    job_in(script)
    script.points = [
        job_pb2.MetricPoint(step=step, name=name) for step in range(5) for name in "abc"
    ]
    points = cluster.get("digits-1").metrics()
    assert [(point.step, point.name) for point in points] == [
        (step, name) for step in range(5) for name in "abc"
    ]


def test_load_reads_yaml_and_json(tmp_path):
    (tmp_path / "job.yaml").write_text("name: a\ntrain: {batch_size: 5}\n")
    (tmp_path / "job.json").write_text('{"name": "a", "train": {"batchSize": 5}}')
    spec = phalanx.load(tmp_path / "job.yaml")
    assert spec == phalanx.load(tmp_path / "job.json")
    assert phalanx.load(tmp_path / "job.yaml", sets=["name=b"]).name == "b"
    with pytest.raises(NotFound):
        phalanx.load(tmp_path / "nothing.yaml")


@pytest.mark.parametrize(
    ("given", "environ", "expected"),
    [
        ("a:1,b:2", {}, ("a:1", "b:2")),
        ("a:1", {"PHALANX_ADDRESS": "b:2"}, ("a:1",)),
        (None, {"PHALANX_ADDRESS": "b:2, c:3"}, ("b:2", "c:3")),
        (None, {}, ("127.0.0.1:7410",)),
    ],
)
def test_which_cluster_is_meant(tmp_path, given, environ, expected):
    assert resolve_addresses(given, {"PHALANX_STATE": str(tmp_path), **environ}) == expected


@pytest.mark.parametrize(
    ("advertised", "dialled", "expected"),
    [
        ("10.0.0.9:7420", "host:7410", "10.0.0.9:7420"),
        ("0.0.0.0:7420", "host:7410", "host:7420"),
        (":7420", "host:7410", "host:7420"),
        ("[::]:7420", "[::1]:7410", "[::1]:7420"),
    ],
)
def test_storage_without_a_host_is_at_the_dialled_host(advertised, dialled, expected):
    assert reachable_address(advertised, dialled) == expected


def test_works_inside_a_running_event_loop(script):
    import asyncio

    async def notebook_cell():
        with phalanx.connect(script.address) as cluster:
            return cluster.describe().leader

    assert asyncio.run(notebook_cell()) == "control-1"


def test_a_refused_call_keeps_its_class_and_reason(script, cluster):
    script.fail("PauseJob", FailedPrecondition("not running", reason="WRONG_STATE"))
    job_in(script)
    with pytest.raises(FailedPrecondition) as refused:
        cluster.get("digits-1").pause()
    assert refused.value.reason == "WRONG_STATE"


def test_garbage_is_collected_with_the_grace_time_of_storage(script, cluster):
    script.garbage.blobs_removed = 3
    assert cluster.gc(dry_run=True).blobs_removed == 3
    assert cluster.gc().blobs_removed == 3
    asked = script.requests("CollectGarbage")
    assert [(each.dry_run, each.grace_s) for each in asked] == [(True, -1), (False, -1)]


# Verbs of the command line that the interface has under another name, or does not have.
_SHOWN = {("show",), ("data", "show"), ("models", "show"), ("status",)}
_OF_A_MACHINE = {("up",), ("down",), ("doctor",), ("chaos",), ("health",)}
_OF_FILES = {
    *(("certs", verb) for verb in ("init", "issue", "renew", "list")),
    *(("token", verb) for verb in ("create", "list", "revoke")),
}
_OF_OPERATORS = {("backup",), ("restore",), ("scrub",)}
_OF_SEVERAL_STEPS = {("train",), ("predict",)}


def test_verbs_have_the_names_that_they_have_on_the_command_line():
    from phalanx.cli.commands import services
    from phalanx.cli.main import app
    from phalanx.sdk.data import DataSets
    from phalanx.sdk.models import Models
    from phalanx.sdk.wheels import Wheels

    homes = {"data": (DataSets,), "models": (Models,), "code": (Wheels,)}
    verbs = [((each.name or each.callback.__name__,), "") for each in app.registered_commands]
    for group in app.registered_groups:
        inner = group.typer_instance.registered_commands
        verbs += [((group.name, each.name or each.callback.__name__), group.name) for each in inner]
    left_out = (
        _SHOWN
        | _OF_A_MACHINE
        | _OF_FILES
        | _OF_OPERATORS
        | _OF_SEVERAL_STEPS
        | {(name,) for name in services.NAMES}
    )
    checked = [(path, home) for path, home in verbs if path not in left_out]
    assert len(checked) > 20
    for path, home in checked:
        owners = homes.get(home, (phalanx.Cluster, phalanx.Job))
        assert any(hasattr(owner, path[-1]) for owner in owners), " ".join(path)
