"""The side that forks. It answers requests, one at a time, on a SOCK_SEQPACKET socket:

    {"fork": plan} + descriptors  ->  {"pid"} + process handle, or {"errno"}
    {"collect": pid}              ->  {"code"}

What a plan says is between the caller of `serve` and the other side, `phalanx.forking.client`. The
process must have one thread and all three standard streams.
"""

import errno
import json
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

REQUEST_LIMIT_BYTES = 65_536
HANDLES_MAX = 4

Plan = dict[str, Any]


def serve(
    requests: socket.socket, before_fork: Callable[[Plan], None] | None = None
) -> tuple[Plan, list[int]] | None:
    """Answer requests until the other side is gone: None. In a forked process: its plan and the
    descriptors that came with it."""
    while True:
        message, handles, _, _ = socket.recv_fds(
            requests, REQUEST_LIMIT_BYTES, HANDLES_MAX, socket.MSG_CMSG_CLOEXEC
        )
        if not message:
            return None
        request = json.loads(message)
        if "collect" in request:
            _, status = os.waitpid(request["collect"], 0)
            _answer(requests, {"code": os.waitstatus_to_exitcode(status)})
            continue
        plan = request["fork"]
        if before_fork is not None:
            before_fork(plan)
        try:
            pid = os.fork()
        except OSError as error:
            _answer(requests, {"errno": error.errno or errno.EAGAIN})
            _close(handles)
            continue
        if pid == 0:
            _leave_the_server(requests)
            return plan, handles
        _close(handles)
        # Nobody has collected the process yet, so the id cannot mean another one.
        handle = os.pidfd_open(pid)
        _answer(requests, {"pid": pid}, [handle])
        os.close(handle)


def print_to(stdout: int, stderr: int) -> None:
    """Make these descriptors the outputs of this process; closes them under their old numbers."""
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    _close({stdout, stderr})


def _leave_the_server(requests: socket.socket) -> None:
    """Give the forked process what a new one has: a session of its own, and nothing to read."""
    os.setsid()
    old = requests.detach()
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    _close({nothing, old} - {0})


def _close(numbers: Sequence[int] | set[int]) -> None:
    for number in numbers:
        os.close(number)


def _answer(requests: socket.socket, answer: dict[str, int], handles: Sequence[int] = ()) -> None:
    socket.send_fds(requests, [json.dumps(answer).encode()], handles)
