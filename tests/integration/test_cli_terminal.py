"""What a person at a terminal sees of a job, and what Ctrl-C leaves behind: nothing.

The program runs on a terminal of its own, with real processes behind it, and Ctrl-C is a key: the
terminal sends the signal to all that runs in its foreground.
"""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from contextlib import contextmanager
from functools import partial

import psutil
import pytest

import phalanx
from phalanx.local.ports import check_free
from phalanx.local.state import is_locked, read_state
from tests.integration.real_processes import alive, wait_for, write_kinds

GUARD_S = 120.0

wait_until = partial(wait_for, guard_s=GUARD_S)
CTRL_C = b"\x03"
COLUMNS = 120
LONG = 1_000_000

JOB = f"""
name: kinds
data: {{name: kinds, shards: 4}}
train:
  model: {{softmax_regression: {{}}}}
  optimizer: {{adam: {{learning_rate: 0.1}}}}
  batch_size: 64
  stop: {{steps: {LONG}}}
  evaluation: {{every_steps: 10}}
  checkpoints: {{every_steps: 10}}
"""

# Takes the terminal as its own, as a shell has its programs do, then becomes the program.
BEHIND_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""
# What moves the cursor or colours the text.
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")

pytestmark = pytest.mark.slow


class Terminal:
    """A program on a pseudo-terminal of its own."""

    def __init__(self, arguments, environment, folder):
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
        program = [sys.executable, "-P", "-m", "phalanx.cli", *arguments]
        self.process = subprocess.Popen(
            [sys.executable, "-c", BEHIND_TERMINAL, *program],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=folder,
            env={**environment, "TERM": "xterm-256color"},
            start_new_session=True,
        )
        os.close(theirs)
        self._raw = b""

    @property
    def raw(self):
        return self._raw.decode(errors="replace")

    @property
    def text(self):
        """All that was ever written, frame after frame, without colours."""
        return _CONTROL.sub("", self.raw).replace("\r", "")

    def wait_for(self, pattern):
        """Read until the screen has shown it; return what was found."""
        deadline_s = time.monotonic() + GUARD_S
        while True:
            found = re.search(pattern, self.text)
            if found:
                return found
            assert time.monotonic() < deadline_s, f"no {pattern!r} in {self.text[-3000:]}"
            assert self._read(), f"it ended without {pattern!r}: {self.text[-3000:]}"

    def press(self, keys):
        os.write(self._ours, keys)

    def end(self):
        """Read to the end; return the exit code."""
        deadline_s = time.monotonic() + GUARD_S
        while self._read():
            assert time.monotonic() < deadline_s, f"it does not end: {self.text[-3000:]}"
        return self.process.wait(GUARD_S)

    def _read(self):
        """Return False once nobody is behind the terminal any more."""
        if not select.select([self._ours], [], [], 1.0)[0]:
            return True
        try:
            data = os.read(self._ours, 65536)
        except OSError:
            return False
        self._raw += data
        return bool(data)

    def close(self):
        family = [self.process.pid, *family_of(self.process.pid)]
        for pid in family:
            if alive([pid]):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(GUARD_S)
        os.close(self._ours)


@contextmanager
def on_terminal(*arguments, folder):
    environment = {**os.environ, "PHALANX_CACHE": str(folder / "cache")}
    environment.pop("PHALANX_ADDRESS", None)
    terminal = Terminal(arguments, environment, folder)
    try:
        yield terminal
    finally:
        terminal.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("terminal")
    write_kinds(path / "kinds.csv")
    (path / "job.yaml").write_text(JOB)
    return path


@pytest.fixture(scope="module")
def cluster(folder):
    with phalanx.LocalCluster(workers=2, slots=1) as local:
        local.data.add("kinds", folder / "kinds.csv", target="kind", test=0.25)
        yield local


@pytest.fixture
def long_job(cluster, folder):
    job = cluster.submit(folder / "job.yaml")
    yield job
    if not job.refresh().done:
        job.cancel()


def test_watch_shows_a_job_live_and_ctrl_c_leaves_it_running(cluster, folder, long_job):
    arguments = ("--address", cluster.address, "watch", long_job.id)
    with on_terminal(*arguments, "--plot", "so-far.png", folder=folder) as screen:
        screen.wait_for(rf"{long_job.id}  RUNNING  kinds@1, 4 shards")
        screen.wait_for(r"[━╸╺]+\s+step [\d,]+/1,000,000  epoch \d+\.\d\d")
        screen.wait_for(r"train/loss \d\.\d+ .*test/accuracy \d\.\d+")
        screen.wait_for(r"examples/s [\d,]+  loss [▁▂▃▄▅▆▇█]+")
        screen.wait_for(r"worker-1 +[█·]{4} +\d")
        screen.wait_for(r"worker-2 +[█·]{4} +\d")
        os.kill(cluster.process("worker-1").pid, signal.SIGKILL)
        screen.wait_for(r"WORKER_LOST .*worker-1")
        screen.wait_for(r"SHARDS_MOVED .*worker-2")
        screen.wait_for(r"RECOVERED ")
        family = family_of(screen.process.pid)
        screen.press(CTRL_C)
        assert screen.end() == 130
        assert f"the job goes on; attach again with: phalanx {' '.join(arguments)}" in screen.text
        assert "curves written to so-far.png" in screen.text
        assert "Traceback" not in screen.text
        shown, hidden = screen.raw.rfind("\x1b[?25h"), screen.raw.rfind("\x1b[?25l")
        assert shown > hidden >= 0, "the cursor stays hidden"
    assert (folder / "so-far.png").read_bytes().startswith(b"\x89PNG")
    assert not alive(family)
    step = long_job.refresh().progress.step
    wait_until(lambda: long_job.refresh().progress.step > step, "the job goes on")
    assert long_job.state == "RUNNING"


def test_watch_on_a_terminal_ends_as_its_job_ends(cluster, folder, long_job):
    with on_terminal("--address", cluster.address, "watch", long_job.id, folder=folder) as screen:
        screen.wait_for(r"RUNNING")
        screen.wait_for(r"step [1-9]")
        long_job.cancel("seen enough")
        assert screen.end() == 1
        assert re.search(rf"{long_job.id}  CANCELLED", screen.text)
        assert "seen enough" in screen.text
    spec = phalanx.load(folder / "job.yaml", sets=["train.stop.steps=40"])
    job = cluster.submit(spec)
    arguments = ("--address", cluster.address, "watch", job.id, "--plot", "curves.png")
    with on_terminal(*arguments, folder=folder) as screen:
        assert screen.end() == 0
        screen.wait_for(rf"{job.id}  SUCCEEDED")
        assert screen.wait_for(r"sha256 +(\w{64})")[1] == job.wait(GUARD_S).parameters_sha256
        assert "curves written to curves.png" in screen.text
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def train(folder, state, *more):
    data = ("--data", "kinds.csv", "--target", "kind", "--test", "0.25")
    arguments = ("train", "job.yaml", *data, "--workers", "2", "--state", str(state), *more)
    return on_terminal(*arguments, folder=folder)


def test_train_brings_its_own_cluster_and_keeps_what_it_learned(folder, tmp_path):
    state, hashes = tmp_path / "state", []
    said = ["added data set kinds@1", "data set kinds@1 is there already"]
    for news in said:
        with train(folder, state, "--set", "train.stop.steps=1000") as screen:
            screen.wait_for(rf"no cluster runs; starting one with 2 workers, state in {state}")
            screen.wait_for(news)
            running = Running(screen.process.pid, state)
            assert screen.end() == 0, screen.text[-3000:]
            screen.wait_for(r"kinds-\w+  SUCCEEDED")
            hashes.append(screen.wait_for(r"sha256 +(\w{64})")[1])
        running.assert_gone()
    assert hashes[0] == hashes[1]
    with phalanx.LocalCluster(workers=1, slots=1, state=state) as later:
        assert [job.state for job in later.jobs()] == ["SUCCEEDED", "SUCCEEDED"]
        assert {model.version for model in later.models.list()} == {1, 2}
        assert later.models.describe("kinds").parameters_sha256 == hashes[0]


def test_ctrl_c_in_train_leaves_nothing_behind_but_a_job_that_goes_on(folder, tmp_path):
    state = tmp_path / "state"
    with train(folder, state) as screen:
        screen.wait_for(r"step [1-9][\d,]*/1,000,000")
        screen.wait_for(r"CHECKPOINT_COMMITTED")
        running = Running(screen.process.pid, state)
        assert len(running.pids) >= 1 + 5 + 2, "workers have leaf processes"
        screen.press(CTRL_C)
        assert screen.end() == 130
        step = int(re.findall(r"step ([\d,]+)/1,000,000", screen.text)[-1].replace(",", ""))
        assert "the job stops with its cluster" in screen.text
        assert f"phalanx up --state {state}" in screen.text
        assert "Traceback" not in screen.text
    running.assert_gone()
    with phalanx.LocalCluster(workers=1, slots=1, state=state) as later:
        [job] = later.jobs()
        wait_until(lambda: job.refresh().progress.step > step, "it goes on")
        [origin] = [event for event in later.events(job.id) if event.type == "STEPS_REPLAYED"]
        assert origin.step >= 10
        assert "from the checkpoint" in origin.message
        job.cancel()


class Running:
    """The processes and ports of a cluster that a program has started for itself."""

    def __init__(self, pid, state_dir):
        self._state_dir = state_dir
        state = read_state(state_dir)
        assert state is not None
        assert state.pid == pid
        self.pids = {pid, *family_of(pid), *(member.pid for member in state.members)}
        addresses = [member.address for member in state.members]
        addresses += [member.metrics_address for member in state.members]
        self._ports = {int(address.rpartition(":")[2]) for address in addresses if address}
        # Storage, control, an aggregator and two workers: each has a port for metrics, the first
        # three one for calls.
        assert len(self.pids) > 1 + 5
        assert len(self._ports) >= 5 + 3

    def assert_gone(self):
        assert not alive(self.pids)
        for port in self._ports:
            check_free(port)
        assert not is_locked(self._state_dir)


def family_of(pid):
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
