"""The process that starts a local cluster's members: it imports their code once and forks.

A Python program of this size spends most of its start on imports. Here they are paid once for all
members, and not again when one is restarted. It runs as ``python -P -m phalanx.local.fork_server
PARENT_PID`` and answers requests, one at a time, on a socket that is its standard input
(``phalanx.local.forks`` is the other side):

    {"fork": {"module", "arguments", "imports", "cwd"}} + log file  ->  {"pid"} + process handle
    {"collect": pid}                                                ->  {"code"}

It has one thread and never talks gRPC, so a fork copies nothing that is half done. It ends, and
with it all members, when its parent does.
"""

import contextlib
import errno
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Any

from setproctitle import setproctitle, setthreadtitle

from phalanx.parent import die_with_parent

REQUEST_LIMIT_BYTES = 65_536


def serve(requests: socket.socket) -> dict[str, Any] | None:
    """Answer requests until the other side is gone: None. In a forked member: what it shall be."""
    while True:
        message, handles, _, _ = socket.recv_fds(requests, REQUEST_LIMIT_BYTES, 1)
        if not message:
            return None
        request = json.loads(message)
        if "collect" in request:
            _, status = os.waitpid(request["collect"], 0)
            _answer(requests, {"code": os.waitstatus_to_exitcode(status)})
            continue
        plan = request["fork"]
        (log,) = handles
        _import(plan["imports"])
        try:
            pid = os.fork()
        except OSError as error:
            _answer(requests, {"errno": error.errno or errno.EAGAIN})
            os.close(log)
            continue
        if pid == 0:
            _leave_the_server(requests, log, plan["cwd"])
            return dict(plan)
        os.close(log)
        # Nobody has collected the process yet, so the id cannot mean another one.
        handle = os.pidfd_open(pid)
        _answer(requests, {"pid": pid}, [handle])
        os.close(handle)


def become(plan: dict[str, Any], server_pid: int) -> None:
    """Run a member's module as ``python -P -m`` would."""
    arguments = [*plan["arguments"], "--parent-pid", str(server_pid)]
    # Without the folder of Python: what it runs is in sight where `ps` cuts the line.
    command = os.path.basename(sys.executable)
    setproctitle(" ".join([command, "-P", "-m", plan["module"], *arguments]))
    if "--id" in arguments:
        # The short name, which `top` and `ps -e` show.
        setthreadtitle(arguments[arguments.index("--id") + 1])
    sys.argv = [plan["module"], *arguments]
    runpy.run_module(plan["module"], run_name="__main__", alter_sys=True)


def _import(names: Sequence[str]) -> None:
    for name in names:
        # A module that cannot be imported is for the member to complain of, in its own log.
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    # What is loaded stays: a collection in a member would only copy these pages.
    gc.collect()
    gc.freeze()


def _leave_the_server(requests: socket.socket, log: int, cwd: str) -> None:
    """Give the forked process what a new one has: a session, streams and a folder of its own."""
    requests.detach()
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(nothing)
    os.close(log)
    os.chdir(cwd)


def _answer(requests: socket.socket, answer: dict[str, int], handles: Sequence[int] = ()) -> None:
    socket.send_fds(requests, [json.dumps(answer).encode()], handles)


def main(argv: Sequence[str]) -> None:
    """Serve; in a forked member, run the member."""
    (parent_pid,) = map(int, argv)
    # A program may have other ideas of signals than its cluster: where SIGCHLD is ignored nobody
    # gets exit codes, and members must hear SIGTERM.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    # Only the supervisor ends this process: what a terminal sends is meant for the supervisor.
    die_with_parent(parent_pid, signal.SIGKILL)
    server_pid = os.getpid()
    plan = serve(socket.socket(fileno=sys.stdin.fileno()))
    if plan is not None:
        become(plan, server_pid)


if __name__ == "__main__":
    main(sys.argv[1:])
