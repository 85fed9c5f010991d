"""The process that starts a local cluster's members: it imports their code once and forks.

A Python program of this size spends most of its start on imports. Here they are paid once for all
members, and not again when one is restarted. It runs as ``python -P -m phalanx.local.fork_server
PARENT_PID`` and answers requests (``phalanx.forking``) on a socket that is its standard input. A
plan has "module", "arguments", "imports" and "cwd", and comes with a log file.

It has one thread and never talks gRPC, so a fork copies nothing that is half done. It ends, and
with it all members, when its parent does.
"""

import contextlib
import gc
import importlib
import os
import runpy
import signal
import socket
import sys
from collections.abc import Sequence

from setproctitle import setproctitle, setthreadtitle

from phalanx.forking.server import Plan, print_to, serve
from phalanx.parent import die_with_parent


def become(plan: Plan, server_pid: int) -> None:
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


def _import(plan: Plan) -> None:
    for name in plan["imports"]:
        # A module that cannot be imported is for the member to complain of, in its own log.
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    # What is loaded stays: a collection in a member would only copy these pages.
    gc.collect()
    gc.freeze()


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
    forked = serve(socket.socket(fileno=sys.stdin.fileno()), _import)
    if forked is not None:
        plan, (log,) = forked
        print_to(log, log)
        os.chdir(plan["cwd"])
        become(plan, server_pid)


if __name__ == "__main__":
    main(sys.argv[1:])
