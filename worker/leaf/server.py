"""The process whose forks are a worker's leaf processes: it has their code loaded.

It answers the session process (`phalanx.forking`) on a socket, has one thread and runs no job's
code. A plan is "memory_limit_bytes" and "gpus", and comes with four descriptors: standard output
and error, the socket and the progress page of the leaf process.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import os
import signal
import socket
import sys
import threading
from typing import NoReturn

from setproctitle import setproctitle, setthreadtitle

from phalanx.forking.server import print_to, serve
from phalanx.rpc.buffers import reuse_large_buffers
from worker.leaf import limits

READY = b"ready"
"""Its first message, without being asked: from now on a fork takes no time."""
_STOPPING = (signal.SIGINT, signal.SIGTERM)
"""Say that the worker shall stop. The session process hears them too, and ends it in order."""
IMPORTS = ("worker.leaf.loop", "phalanx.numeric_fingerprint", "numpy.random")


def run(requests: socket.socket, parent_pid: int) -> NoReturn:
    """Fork leaf processes until the session process closes the socket or dies; in a leaf process,
    be one until then."""
    code = 1
    try:
        _prepare(parent_pid)
        server_pid = os.getpid()
        requests.send(READY)
        forked = serve(requests)
        if forked is not None:
            plan, (stdout, stderr, socket_fd, progress_fd) = forked
            print_to(stdout, stderr)
            _show("leaf", parent_pid)
            _restrict(server_pid, plan["memory_limit_bytes"])
            limits.show_gpus(plan["gpus"])
            _serve_leaves(socket_fd, progress_fd)
        code = 0
    except BaseException:  # noqa: BLE001 - nothing may get back to what ran before the fork
        sys.excepthook(*sys.exc_info())
    # Threads and exit hooks of user code do not keep a process that has no work any more.
    os._exit(code)


def _prepare(parent_pid: int) -> None:
    limits.die_with(parent_pid)
    limits.no_core_dumps()
    # A program may have other ideas: where SIGCHLD is ignored nobody gets exit codes.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in _STOPPING:
        signal.signal(number, signal.SIG_IGN)
    sys.argv = ["worker.leaf"]
    _show("leaf-server", parent_pid)
    reuse_large_buffers()
    for name in IMPORTS:
        importlib.import_module(name)
    # What is loaded stays: the collector need not walk through it, and a collection in a leaf
    # process would only copy these pages.
    gc.collect()
    gc.freeze()


def _restrict(server_pid: int, memory_limit_bytes: int) -> None:
    """Make a fork what the session process expects of a leaf process."""
    limits.die_with(server_pid)
    limits.give_way()
    _ignore_stopping()
    faulthandler.enable(2)
    if sys.stdin is None:
        # Where the worker was started without; output streams are made anew anyway.
        sys.stdin = os.fdopen(0)
    _forget_chance()
    limits.limit_memory(memory_limit_bytes)


def _ignore_stopping() -> None:
    """Stay deaf, but let processes that user code starts be stopped: what is ignored is ignored by
    them too, also when they run another program, and whoever stops them would wait for ever."""
    for number in _STOPPING:
        signal.signal(number, lambda *_: None)
        signal.siginterrupt(number, False)
    os.register_at_fork(
        before=_hold_back, after_in_parent=_let_through, after_in_child=_stop_as_usual
    )


_held_back = threading.local()


def _hold_back() -> None:
    """What reaches a new process before it stops as usual must wait until it does, not be lost:
    multiprocessing.Pool ends processes that have hardly begun, and waits for them."""
    _held_back.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _let_through() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _held_back.mask)


def _stop_as_usual() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _let_through()


def _forget_chance() -> None:
    """Let user code that draws without a seed draw other numbers in each process; Python does this
    for its own generator."""
    sys.modules["numpy.random"].seed()


def _serve_leaves(socket_fd: int, progress_fd: int) -> None:
    from worker.ipc import BlockingConnection, ConnectionClosed
    from worker.leaf.loop import LeafLoop
    from worker.memory import ProgressPage

    connection = BlockingConnection(socket.socket(fileno=socket_fd))
    with contextlib.suppress(ConnectionClosed):
        LeafLoop(connection, ProgressPage(progress_fd)).serve()


def _show(what: str, session_pid: int) -> None:
    """Name this process in the long and the short column of `ps`."""
    command = os.path.basename(sys.executable)
    setproctitle(f"{command} -P -m worker.leaf: {what} of process {session_pid}")
    setthreadtitle(what)
