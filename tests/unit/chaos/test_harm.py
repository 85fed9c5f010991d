"""Real signals to real processes: what is stopped goes on in any case."""

import io
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from phalanx.chaos.guard import guard
from phalanx.chaos.harm import Harm
from phalanx.chaos.schedule import FAULTS

GUARD_S = 30.0


@pytest.fixture
def sleeper():
    """A process that does nothing until it is killed."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def _wait_for(process, *states):
    deadline_s = time.monotonic() + GUARD_S
    while psutil.Process(process.pid).status() not in states:
        assert time.monotonic() < deadline_s, f"the process never was {states}"


def _running(process):
    _wait_for(process, psutil.STATUS_SLEEPING, psutil.STATUS_RUNNING, psutil.STATUS_DISK_SLEEP)


def test_a_pause_ends_with_the_block(sleeper):
    with Harm() as harm:
        assert harm.inflict(FAULTS["pause-worker"], sleeper.pid)
        _wait_for(sleeper, psutil.STATUS_STOPPED)
        assert harm.held == {sleeper.pid}
    _running(sleeper)


def test_a_pause_ends_when_the_block_fails(sleeper):
    with pytest.raises(ZeroDivisionError), Harm() as harm:
        harm.inflict(FAULTS["pause-worker"], sleeper.pid)
        _wait_for(sleeper, psutil.STATUS_STOPPED)
        raise ZeroDivisionError
    _running(sleeper)


def test_a_slow_process_stops_and_goes_on_again_and_again(sleeper):
    with Harm() as harm:
        assert harm.inflict(FAULTS["slow-worker"], sleeper.pid)
        for _ in range(3):
            _wait_for(sleeper, psutil.STATUS_STOPPED)
            _running(sleeper)
    _running(sleeper)


def test_a_kill_and_a_process_that_is_gone(sleeper):
    with Harm() as harm:
        assert harm.inflict(FAULTS["kill-worker"], sleeper.pid)
        assert sleeper.wait(GUARD_S) == -signal.SIGKILL
        assert not harm.inflict(FAULTS["kill-worker"], sleeper.pid)
        assert not harm.inflict(FAULTS["pause-worker"], sleeper.pid)


def test_the_guard_continues_what_a_killed_program_left_stopped(sleeper):
    program = (
        "import os, signal\n"
        "from phalanx.chaos.harm import Harm\n"
        "from phalanx.chaos.schedule import FAULTS\n"
        f"Harm().inflict(FAULTS['pause-worker'], {sleeper.pid})\n"
        "input()\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE) as chaos:
        _wait_for(sleeper, psutil.STATUS_STOPPED)
        chaos.kill()
    _running(sleeper)


def test_the_guard_leaves_alone_what_was_taken_back(sleeper):
    os.kill(sleeper.pid, signal.SIGSTOP)
    _wait_for(sleeper, psutil.STATUS_STOPPED)
    guard(io.StringIO(f"+{sleeper.pid}\n-{sleeper.pid}\n"))
    assert psutil.Process(sleeper.pid).status() == psutil.STATUS_STOPPED
    guard(io.StringIO(f"+{sleeper.pid}\n+{2**22}\n"))
    _running(sleeper)
