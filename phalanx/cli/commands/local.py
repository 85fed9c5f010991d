"""Running a cluster on this machine from the command line."""

from __future__ import annotations

import contextlib
import fcntl
import os
import queue
import select
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import psutil
from setproctitle import setproctitle, setthreadtitle

from phalanx.cli.context import Settings
from phalanx.cli.errors import Exit
from phalanx.errors import DeadlineExceeded, FailedPrecondition, NotFound, Unavailable
from phalanx.local.options import LocalOptions
from phalanx.local.ports import check_free
from phalanx.local.state import ClusterState, is_locked, read_state
from phalanx.local.supervisor import START_TIMEOUT_S, Supervisor
from phalanx.sdk.discovery import DEFAULT_ADDRESS, default_state_dir
from phalanx.texts import number_of

if TYPE_CHECKING:
    from phalanx.sdk.cluster import Cluster

DOWN_TIMEOUT_S = 20.0
_PROBE_TIMEOUT_S = 2.0
_REMARKS_MAX = 1000


def run_in_foreground(options: LocalOptions, settings: Settings) -> int:
    """Run a cluster until Ctrl-C or SIGTERM; return the exit code. A second one ends it at once."""
    from phalanx.cli.output import say

    supervisor: Supervisor | None = None
    # Written by this thread alone: a terminal that is held (Ctrl-S) must not hold up restarts. None
    # is a wish to stop; a handler of signals may put it there at any moment.
    remarks: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    stopping = False
    code = Exit.DONE

    def on_remark(text: str) -> None:
        if remarks.qsize() < _REMARKS_MAX:
            remarks.put(text)

    def on_signal(number: int, _frame: FrameType | None) -> None:
        nonlocal code, stopping
        code = Exit.INTERRUPTED if number == signal.SIGINT else Exit.DONE
        if supervisor is None:
            # Still starting: the start is given up and leaves nothing behind.
            raise KeyboardInterrupt
        if stopping:
            supervisor.hurry()
        stopping = True
        remarks.put(None)

    for number in signals_that_stop():
        signal.signal(number, on_signal)
    started_at_s = time.monotonic()
    supervisor = Supervisor.launch(options, on_remark=on_remark)
    try:
        state = read_state(options.state_dir)
        if state is not None:
            show_started(state, options.state_dir, settings, time.monotonic() - started_at_s)
        if not settings.json:
            say("  Ctrl-C stops the cluster; its data stays in the state folder")
        _say_remarks(remarks, supervisor)
        if not settings.json:
            say("stopping …")
    finally:
        supervisor.stop()
    return code


def signals_that_stop() -> list[signal.Signals]:
    """Return what ends a cluster in the foreground: not the end of the terminal, under nohup."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    return numbers


def _say_remarks(remarks: queue.SimpleQueue[str | None], supervisor: Supervisor) -> None:
    from phalanx.cli.output import say

    while True:
        with contextlib.suppress(queue.Empty):
            remark = remarks.get(timeout=1.0)
            if remark is None:
                return
            # On a full disk, or when nobody reads any more, the cluster goes on without.
            with contextlib.suppress(OSError):
                say(remark)
        if supervisor.wait(0):
            raise FailedPrecondition("the supervisor has ended by itself; see the logs")


def start_in_background(options: LocalOptions, settings: Settings) -> None:
    """Run a cluster in a process of its own, a fork of this one, and wait until it is ready."""
    if is_locked(options.state_dir):
        raise FailedPrecondition(
            f"a cluster already runs with its state in {options.state_dir}; "
            "`phalanx status` shows it, `phalanx down` stops it",
            reason="STATE_IN_USE",
        )
    if options.port:
        check_free(options.port)
    started_at_s = time.monotonic()
    (options.state_dir / "logs").mkdir(parents=True, exist_ok=True, mode=0o700)
    log_path = options.state_dir / "logs" / "up.log"
    pid = os.fork()
    if pid == 0:
        _leave_the_terminal(log_path, options.state_dir)
        raise SystemExit(run_in_foreground(options, settings))
    process = psutil.Process(pid)
    try:
        state = _wait_until_ready(process, options.state_dir, log_path)
    except BaseException:
        process.terminate()
        process.wait(DOWN_TIMEOUT_S)
        raise
    show_started(state, options.state_dir, settings, time.monotonic() - started_at_s)


def _leave_the_terminal(log_path: Path, state_dir: Path) -> None:
    os.setsid()
    # Above the streams, of which this program may lack some.
    nothing = fcntl.fcntl(os.open(os.devnull, os.O_RDONLY), fcntl.F_DUPFD, 3)
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    log = fcntl.fcntl(log, fcntl.F_DUPFD, 3)
    for source, stream in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, stream)
    # Also what the shell had open, such as the lock of a script: nobody must wait for the cluster.
    for number in map(int, os.listdir("/proc/self/fd")):
        if number > 2:
            with contextlib.suppress(OSError):
                os.close(number)
    setproctitle(f"{os.path.basename(sys.executable)} -P -m phalanx.cli up --state={state_dir}")
    setthreadtitle("phalanx up")


def _wait_until_ready(process: psutil.Process, state_dir: Path, log_path: Path) -> ClusterState:
    deadline_s = time.monotonic() + START_TIMEOUT_S + 5
    while time.monotonic() < deadline_s:
        with contextlib.suppress(psutil.TimeoutExpired):
            process.wait(0)
            said = log_path.read_text(errors="replace").strip().removeprefix("error: ")
            raise FailedPrecondition(said or f"the cluster did not start; see {log_path}")
        state = read_state(state_dir)
        if state is not None and state.ready and state.pid == process.pid:
            return state
        time.sleep(0.02)
    raise DeadlineExceeded(f"the cluster was not ready in time; see {log_path}")


def show_started(state: ClusterState, state_dir: Path, settings: Settings, took_s: float) -> None:
    """Tell that a cluster is ready, and what to do with it."""
    from phalanx.cli.output import print_json, say

    if settings.json:
        print_json(state_to_json(state, state_dir))
        return
    say(f"the cluster is ready after {took_s:.1f} s")
    for member in state.members:
        where = member.address if member.role != "worker" else ""
        say(f"  {member.id:<14} pid {member.pid:<8} {where}".rstrip())
    say(f"  state in {state_dir}")
    if state_dir != default_state_dir() and state.address != DEFAULT_ADDRESS:
        say(f"  export PHALANX_ADDRESS={state.address}")
    if state.keys_dir:
        say(f"  keys in {state.keys_dir}; this user needs no flags on this machine")
    say("  next: phalanx data add NAME FILE · phalanx submit job.yaml · phalanx watch JOB")


def list_members(state: ClusterState) -> None:
    """Write a table of the processes to standard output."""
    from phalanx.cli.output import print_table

    print_table(
        ("PROCESS", "PID", "ADDRESS", "METRICS", "RESTARTS"),
        [
            (
                member.id,
                str(member.pid) if member.pid else "down",
                member.address if member.role != "worker" else "",
                member.metrics_address,
                member.restarts,
            )
            for member in state.members
        ],
        empty="no process runs",
    )


def state_to_json(state: ClusterState, state_dir: Path) -> dict[str, object]:
    """Return the JSON of `up` and `status`."""
    return {
        "pid": state.pid,
        "address": state.address,
        "storage_address": state.storage_address,
        "keys_dir": state.keys_dir,
        "state_dir": str(state_dir),
        "version": state.version,
        "processes": [
            {
                "role": member.role,
                "id": member.id,
                "pid": member.pid,
                "address": member.address,
                "metrics_address": member.metrics_address,
                "restarts": member.restarts,
                "log": member.log,
            }
            for member in state.members
        ],
    }


def stop_cluster(state_dir: Path) -> ClusterState:
    """End the cluster that runs on a state folder; return what it was. Raises NotFound if none
    does."""
    if not is_locked(state_dir):
        raise NotFound(
            f"no cluster runs with its state in {state_dir}; start one with `phalanx up`"
        )
    state = read_state(state_dir)
    if state is None:
        raise Unavailable(f"the cluster in {state_dir} is just starting or stopping; try again")
    try:
        # The lock proves that the process which wrote its id lives, and the handle stays with it.
        process = os.pidfd_open(state.pid)
    except ProcessLookupError:
        return state
    try:
        # Its children die with it, also when it has to be killed.
        for number in (signal.SIGTERM, signal.SIGKILL):
            signal.pidfd_send_signal(process, number)
            if select.select([process], [], [], DOWN_TIMEOUT_S)[0]:
                return state
    except ProcessLookupError:
        return state
    finally:
        os.close(process)
    raise DeadlineExceeded(f"process {state.pid} does not end; its state is in {state_dir}")


def cluster_for_training(settings: Settings, workers: int, state: Path | None) -> Cluster:
    """Return the cluster that the user means, else a new one that ends with its ``with`` block."""
    from phalanx.cli.output import say
    from phalanx.local.cluster import LocalCluster

    if settings.address or (os.environ.get("PHALANX_ADDRESS") and state is None):
        return settings.connect()
    folder = (state or default_state_dir()).absolute()
    running = read_state(folder)
    if running is not None:
        return settings.connect_local(running)
    if state is None and _answers(settings):
        return settings.connect()
    if not settings.json:
        say(f"no cluster runs; starting one with {number_of(workers, 'worker')}, state in {folder}")
    return LocalCluster(workers, state=folder, namespace=settings.namespace)


def _answers(settings: Settings) -> bool:
    at_default = replace(settings, address=DEFAULT_ADDRESS, timeout_s=_PROBE_TIMEOUT_S)
    try:
        with at_default.connect() as cluster:
            cluster.describe()
    except (Unavailable, DeadlineExceeded):
        return False
    return True
