"""What a service process does at its start and its end, shown on real processes."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from phalanx.config import ServiceConfig
from phalanx.errors import FailedPrecondition
from phalanx.rpc.process import announce

GUARD_S = 60

PROGRAM = """
import asyncio, os, sys
from dataclasses import dataclass
from phalanx.config import ServerConfig, parse
from phalanx.errors import FailedPrecondition
from phalanx.rpc.process import announce, run_service
from phalanx.rpc.server import Server

async def serve(config, stop):
    if config.id == "defect":
        raise ZeroDivisionError("by design")
    server = Server(listen=config.listen, metrics_listen=config.metrics_listen, service_names=[])
    await server.start()
    announce(config, role="test", address=server.address, metrics_address=server.metrics_address)
    print("ready", flush=True)
    await stop.wait()
    if config.id == "slow":
        await asyncio.Event().wait()
    await server.stop(0)
    print("stopped", flush=True)

sys.exit(run_service(parse(ServerConfig, prog="phalanx test"), serve, role="test"))
"""

# Starts the service as its own child, says the child's id, and waits to be killed.
PARENT = """
import os, subprocess, sys
command = [sys.executable, "-P", "-c", sys.argv[1], "--parent-pid", str(os.getpid())]
child = subprocess.Popen(command,
                         stdout=subprocess.PIPE, text=True)
child.stdout.readline()
print(child.pid, flush=True)
sys.stdin.read()
"""


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.getcwd()}


def _start(*flags: str, program: str = PROGRAM) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", "-c", program, *flags],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=_environment(),
    )


def _ready(process: subprocess.Popen[str]) -> subprocess.Popen[str]:
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_stops_cleanly(number: signal.Signals) -> None:
    process = _ready(_start())
    process.send_signal(number)
    output, _ = process.communicate(timeout=GUARD_S)
    assert (process.returncode, output) == (0, "stopped\n")


def test_second_signal_ends_a_process_that_does_not_come_to_its_end() -> None:
    process = _ready(_start("--id", "slow"))
    process.send_signal(signal.SIGTERM)
    assert process.stderr is not None
    assert '"stopping"' in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=GUARD_S)
    assert process.returncode == 130


def test_port_in_use_gives_exit_code_2_and_names_the_address(tmp_path: Path) -> None:
    announcement = tmp_path / "first.json"
    first = _ready(_start("--announce", str(announcement)))
    address = json.loads(announcement.read_text())["address"]
    second = _start("--listen", address)
    _, errors = second.communicate(timeout=GUARD_S)
    assert second.returncode == 2
    assert f"phalanx test: cannot listen on {address}: the port is in use" in errors
    assert "Traceback" not in errors
    first.terminate()
    first.communicate(timeout=GUARD_S)


def test_defect_gives_exit_code_70_and_a_logged_traceback() -> None:
    process = _start("--id", "defect")
    _, errors = process.communicate(timeout=GUARD_S)
    assert process.returncode == 70
    line = json.loads(errors.splitlines()[-1])
    assert (line["event"], line["role"], line["id"]) == ("crashed", "test", "defect")
    assert "ZeroDivisionError: by design" in line["exception"]


def test_announcement_tells_what_others_need(tmp_path: Path) -> None:
    announcement = tmp_path / "member.json"
    process = _ready(_start("--announce", str(announcement), "--id", "member-1"))
    facts = json.loads(announcement.read_text())
    assert facts.pop("address").startswith("127.0.0.1:")
    assert facts.pop("metrics_address").startswith("127.0.0.1:")
    assert facts == {"role": "test", "id": "member-1", "pid": process.pid}
    assert os.listdir(tmp_path) == ["member.json"]
    process.terminate()
    process.communicate(timeout=GUARD_S)


def test_announcement_that_cannot_be_written_is_an_error_that_names_it(tmp_path: Path) -> None:
    missing = tmp_path / "missing" / "member.json"
    process = _start("--announce", str(missing))
    _, errors = process.communicate(timeout=GUARD_S)
    assert process.returncode == 2
    assert str(missing) in errors


@pytest.mark.parametrize("stopped", [False, True])
def test_service_dies_with_its_parent_even_while_it_is_stopped(stopped: bool) -> None:
    parent = _start(PROGRAM, program=PARENT)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    watch = os.pidfd_open(child)
    if stopped:
        os.kill(child, signal.SIGSTOP)
    parent.kill()
    parent.communicate(timeout=GUARD_S)
    assert _ended(watch)
    os.close(watch)


def test_service_whose_parent_is_already_gone_does_not_start() -> None:
    process = _start("--parent-pid", "1")
    output, _ = process.communicate(timeout=GUARD_S)
    assert (process.returncode, output) == (130, "")


def _ended(pidfd: int) -> bool:
    import select

    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(GUARD_S * 1000))


def test_on_a_full_disk_an_announcement_takes_the_place_of_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever died there must be able to come back."""
    path = tmp_path / "member.json"
    config = ServiceConfig(id="member-1", announce=path)
    announce(config, role="test", address="127.0.0.1:12345")

    def full(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    announce(config, role="test", address="127.0.0.1:1")
    assert json.loads(path.read_text())["address"] == "127.0.0.1:1"
    assert os.listdir(tmp_path) == ["member.json"]
    path.unlink()
    with pytest.raises(FailedPrecondition, match="No space left"):
        announce(config, role="test", address="127.0.0.1:1")
