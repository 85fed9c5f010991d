"""The supervisor with real processes that do nothing: quick, and every way to die can be tried."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import psutil
import pytest

from phalanx.errors import DeadlineExceeded, FailedPrecondition, PhalanxError
from phalanx.local.layout import Layout
from phalanx.local.members import MemberPlan
from phalanx.local.options import LocalOptions
from phalanx.local.state import read_state
from phalanx.local.supervisor import Supervisor
from tests.integration.real_processes import alive, wait_for

GUARD_S = 20.0

wait_until = partial(wait_for, guard_s=GUARD_S)

IDLE_MEMBER = """
import json, os, pathlib, signal, sys, time
from phalanx.parent import die_with_parent

options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
die_with_parent(int(options["--parent-pid"]))
how = os.environ.get("IDLE_" + options["--id"].replace("-", "_"), "")
if how == "refuse":
    sys.exit("cannot run: wrong flag")
if how == "usage":
    print("port 1 is no good", file=sys.stderr)
    sys.exit(2)
if how == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
if how != "mute":
    path = pathlib.Path(options["--announce"])
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"pid": os.getpid(), "address": "127.0.0.1:1"}))
    partial.replace(path)
while True:
    signal.pause()
"""


@pytest.fixture
def idle(tmp_path, monkeypatch):
    """Let every member be an idle process; returns a maker of options."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "idle_member.py").write_text(IDLE_MEMBER)
    state = tmp_path / "state with spaces"

    def plan(self, role, id, arguments):
        return MemberPlan(role, id, ("idle_member",), state / "logs" / id, state / "run" / id)

    monkeypatch.setattr(Layout, "_plan", plan)

    def options(**how):
        path = os.pathsep.join([str(tmp_path / "code"), str(Path.cwd())])
        environment = {"PYTHONPATH": path, **{f"IDLE_{id}": what for id, what in how.items()}}
        return LocalOptions(state_dir=state, workers=2, environment=environment)

    return options


def test_starts_distinct_processes_and_ends_them_all(idle):
    supervisor = Supervisor.launch(idle())
    try:
        members = supervisor.members()
        pids = [member.pid for member in members]
        assert len(set(pids)) == 5
        assert alive(pids) == pids
        assert read_state(supervisor.options.state_dir).ready
    finally:
        supervisor.stop()
    assert not alive(pids)
    assert read_state(supervisor.options.state_dir) is None
    supervisor.stop()


@pytest.mark.parametrize("id", ["worker-1", "storage", "control-1", "aggregator-1"])
def test_what_dies_is_started_again_under_the_same_name(idle, id):
    remarks = []
    supervisor = Supervisor.launch(idle(), on_remark=remarks.append)
    try:
        before = supervisor.member(id)
        os.kill(before.pid, signal.SIGKILL)
        wait_until(lambda: supervisor.member(id).pid not in (0, before.pid), "a new process")
        after = supervisor.member(id)
        assert (after.restarts, after.log) == (1, before.log)
        assert remarks == [f"{id} was killed by signal 9; it is started again"]
    finally:
        supervisor.stop()


def test_a_listener_that_fails_does_not_take_the_cluster_down(idle):
    told = threading.Event()

    def full_disk(_text):
        told.set()
        raise OSError(28, "No space left on device")

    supervisor = Supervisor.launch(idle(), on_remark=full_disk)
    try:
        before = supervisor.member("worker-1")
        os.kill(before.pid, signal.SIGKILL)
        wait_until(
            lambda: supervisor.member("worker-1").pid not in (0, before.pid), "a new process"
        )
        assert told.is_set()
        assert not supervisor.wait(0)
    finally:
        supervisor.stop()


def test_the_death_of_the_process_that_starts_them_is_one_more_death_to_survive(idle):
    supervisor = Supervisor.launch(idle())
    try:
        before = {member.id: member.pid for member in supervisor.members()}
        server = {psutil.Process(pid).ppid() for pid in before.values()}
        assert len(server) == 1
        os.kill(server.pop(), signal.SIGKILL)

        def all_are_new():
            now = {member.id: member.pid for member in supervisor.members() if member.address}
            return now.keys() == before.keys() and not set(now.values()) & set(before.values())

        wait_until(all_are_new, "every process is there again")
        assert not alive(before.values())
    finally:
        supervisor.stop()


def test_processes_show_what_they_are(idle):
    supervisor = Supervisor.launch(idle())
    try:
        member = supervisor.member("worker-1")
        words = psutil.Process(member.pid).cmdline()
        assert words[1:4] == ["-P", "-m", "idle_member"]
        assert words[words.index("--id") + 1] == "worker-1"
        assert "/" not in words[0], "what it runs is in sight where the line is cut"
        assert psutil.Process(member.pid).name() == "worker-1"
        assert os.getsid(member.pid) == member.pid
    finally:
        supervisor.stop()


def test_a_worker_that_left_is_not_started_again(idle):
    supervisor = Supervisor.launch(idle())
    try:
        os.kill(supervisor.member("worker-1").pid, signal.SIGTERM)
        wait_until(lambda: len(supervisor.members()) == 4, "the worker has left")
        assert supervisor.add_worker() == "worker-3"
        wait_until(lambda: supervisor.member("worker-3").address, "the new worker is ready")
    finally:
        supervisor.stop()


def test_a_process_that_cannot_run_ends_the_start_with_its_own_words(idle):
    with pytest.raises(FailedPrecondition, match="wrong flag") as refused:
        Supervisor.launch(idle(worker_2="refuse"))
    assert "worker-2" in str(refused.value)
    assert refused.value.reason == "MEMBER_CANNOT_RUN"


def test_a_wrong_setting_is_not_tried_again(idle):
    options = idle(control_1="usage")
    with pytest.raises(FailedPrecondition, match="port 1 is no good"):
        Supervisor.launch(options)
    log = (options.state_dir / "logs" / "control-1").read_text()
    assert log.count("no good") == 1


def test_a_start_that_takes_too_long_names_who_is_missing_and_leaves_nothing(idle):
    supervisor = Supervisor(idle(aggregator_1="mute"))
    with pytest.raises(DeadlineExceeded, match="aggregator-1"):
        supervisor.start(timeout_s=1.0)
    assert not supervisor.members()
    Supervisor.launch(idle()).stop()


def test_stopping_kills_what_does_not_listen(idle, monkeypatch):
    monkeypatch.setattr("phalanx.local.supervisor.DRAIN_S", 0.2)
    supervisor = Supervisor.launch(idle(worker_1="deaf"))
    pids = [member.pid for member in supervisor.members()]
    supervisor.stop()
    assert not alive(pids)


def test_a_process_that_is_stopped_may_still_end_in_order(idle, monkeypatch):
    # With so much patience it must have woken up to hear of the end, not have been killed.
    monkeypatch.setattr("phalanx.local.supervisor.DRAIN_S", 10 * GUARD_S)
    supervisor = Supervisor.launch(idle())
    pid = supervisor.member("worker-1").pid
    os.kill(pid, signal.SIGSTOP)
    stopping = threading.Thread(target=supervisor.stop)
    stopping.start()
    stopping.join(GUARD_S)
    in_order = not stopping.is_alive()
    supervisor.hurry()
    stopping.join(GUARD_S)
    assert in_order
    assert not alive([pid])


def test_an_end_that_goes_wrong_is_an_end(idle, monkeypatch):
    supervisor = Supervisor.launch(idle())
    pids = [member.pid for member in supervisor.members()]

    def fails(_):
        raise PermissionError("the folder belongs to somebody else now")

    monkeypatch.setattr("phalanx.local.supervisor.remove_state", fails)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    stopping = threading.Thread(target=supervisor.stop)
    stopping.start()
    stopping.join(GUARD_S)
    assert not stopping.is_alive()
    assert not alive(pids)
    supervisor._lock_file.close()


def test_a_program_with_many_open_files_can_have_a_cluster(idle):
    with contextlib.ExitStack() as files:
        for _ in range(1100):
            files.callback(os.close, os.open(os.devnull, os.O_RDONLY))
        supervisor = Supervisor.launch(idle())
        try:
            assert supervisor.members()
        finally:
            supervisor.stop()


def test_two_supervisors_cannot_have_one_folder(idle):
    supervisor = Supervisor.launch(idle())
    before = os.listdir("/proc/self/fd")
    try:
        with pytest.raises(FailedPrecondition, match="already runs"):
            Supervisor.launch(idle())
        assert os.listdir("/proc/self/fd") == before
    finally:
        supervisor.stop()


def test_another_program_that_took_the_port_is_no_failure(idle, monkeypatch):
    tries = []
    start = Supervisor.start

    def unlucky(self, timeout_s):
        tries.append(self)
        if len(tries) == 1:
            raise FailedPrecondition("the port is in use", reason="PORT_TAKEN")
        start(self, timeout_s)

    monkeypatch.setattr(Supervisor, "start", unlucky)
    Supervisor.launch(idle()).stop()
    assert len(tries) == 2


def test_a_stop_during_the_start_leaves_nothing(idle):
    supervisor = Supervisor(idle(worker_1="mute"))
    failures = []

    def start():
        try:
            supervisor.start()
        except PhalanxError as error:
            failures.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    wait_until(lambda: any(member.pid for member in supervisor.members()), "a first process")
    pids = [member.pid for member in supervisor.members() if member.pid]
    supervisor.stop()
    thread.join(GUARD_S)
    assert not thread.is_alive()
    assert not alive(pids)
    assert len(failures) == 1


PROGRAM = """
import json, os, sys, threading
from pathlib import Path
from phalanx.local.layout import Layout
from phalanx.local.members import MemberPlan
from phalanx.local.options import LocalOptions
from phalanx.local.supervisor import Supervisor

state = Path(sys.argv[1])
Layout._plan = lambda self, role, id, arguments: MemberPlan(
    role, id, ("idle_member",), state / "logs" / id, state / "run" / id
)
supervisor = Supervisor.launch(LocalOptions(state_dir=state, workers=2))
print(json.dumps([member.pid for member in supervisor.members()]), flush=True)
if sys.argv[2] == "wait":
    threading.Event().wait()
"""


@pytest.mark.parametrize("end", ["kill -9", "return"])
def test_processes_die_with_their_parent_however_it_ends(idle, tmp_path, end):
    options = idle()
    program = subprocess.Popen(
        [
            *(sys.executable, "-c", PROGRAM, str(options.state_dir)),
            "wait" if end == "kill -9" else "return",
        ],
        stdout=subprocess.PIPE,
        env={**os.environ, **options.environment},
    )
    try:
        pids = json.loads(program.stdout.readline())
        assert len(set(pids)) == 5
        if end == "kill -9":
            assert alive(pids) == pids
            program.kill()
        program.wait(GUARD_S)
        wait_until(lambda: not alive(pids), "all processes have ended")
    finally:
        program.kill()
        program.wait()
        program.stdout.close()
