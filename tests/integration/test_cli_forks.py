"""Members as forks: what a program around them, and deaths in an odd order, must not do to them."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from phalanx.local.forks import ForkServer

GUARD_S = 20.0

MEMBER = """
import signal, sys
from phalanx.parent import die_with_parent
if "--dies-alone" not in sys.argv:
    die_with_parent(int(sys.argv[-1]))
print("out", flush=True)
print("err", file=sys.stderr, flush=True)
signal.pause()
"""


@pytest.fixture
def server(tmp_path):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "forked_member.py").write_text(MEMBER)
    path = os.pathsep.join([str(tmp_path / "code"), str(Path.cwd())])
    server = ForkServer({**os.environ, "PYTHONPATH": path})
    yield server
    server.close()


def start(server, folder, *arguments):
    with open(folder / "member.log", "ab") as log:
        return server.fork("forked_member", arguments, imports=(), cwd=folder, log=log.fileno())


def test_a_late_death_of_an_old_servers_member_does_not_harm_the_new_server(server, tmp_path):
    first, second = start(server, tmp_path), start(server, tmp_path, "--dies-alone")
    old = server._server
    os.kill(old.pid, signal.SIGKILL)
    assert first.wait(GUARD_S)
    assert first.poll() == -signal.SIGKILL
    third = start(server, tmp_path)
    assert server._server is not old
    second.send_signal(signal.SIGKILL)
    assert second.wait(GUARD_S)
    assert second.poll() == -signal.SIGKILL
    assert third.poll() is None
    fourth = start(server, tmp_path)
    for process in (third, fourth):
        process.send_signal(signal.SIGTERM)
        assert process.wait(GUARD_S)
        assert process.poll() == -signal.SIGTERM


def test_a_server_that_is_stopped_is_woken_up(server, tmp_path):
    process = start(server, tmp_path)
    os.kill(server._server.pid, signal.SIGSTOP)
    process.send_signal(signal.SIGTERM)
    assert process.wait(GUARD_S)
    assert process.poll() == -signal.SIGTERM


def test_a_process_whose_handle_finds_no_room_here_is_ended(server, tmp_path):
    start(server, tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(tmp_path / "member.log", "ab") as log:
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                server.fork("forked_member", [], imports=(), cwd=tmp_path, log=log.fileno())
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(psutil.Process(server._server.pid).children()) == 1
    assert start(server, tmp_path).poll() is None


PROGRAM = """
import os, signal, sys
from pathlib import Path
from phalanx.local.forks import ForkServer

folder = Path(sys.argv[1])
for number in filter(str.isdigit, sys.argv[2:]):
    os.close(int(number))
if "ignore" in sys.argv:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
server = ForkServer(os.environ)
with open(folder / "member.log", "ab") as log:
    number = log.fileno()
    process = server.fork("forked_member", [], imports=(), cwd=folder, log=number)
while (folder / "member.log").read_text().count("\\n") < 2 and not process.wait(0.01):
    pass
process.send_signal(signal.SIGTERM)
code = process.poll() if process.wait(60) else process.send_signal(signal.SIGKILL)
server.close()
os._exit(0 if code == -signal.SIGTERM else 1)
"""


@pytest.mark.parametrize("lacks", ["2", "0 1 2", "ignore"])
def test_members_have_streams_and_signals_whatever_the_program_has(server, tmp_path, lacks):
    path = server._environment["PYTHONPATH"]
    command = [sys.executable, "-P", "-c", PROGRAM, str(tmp_path), *lacks.split()]
    done = subprocess.run(
        command, check=False, env={**os.environ, "PYTHONPATH": path}, timeout=GUARD_S
    )
    assert done.returncode == 0
    assert (tmp_path / "member.log").read_text() == "out\nerr\n"
