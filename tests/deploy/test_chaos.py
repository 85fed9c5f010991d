"""deploy/chaos/kill_workers.py against a stand-in for the engine."""

import json
import socketserver
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from phalanx.testing.datasets import REPOSITORY

NAMES = {"aaa": "here-worker-1", "bbb": "here-worker-2"}


class Engine(socketserver.ThreadingUnixStreamServer):
    """Knows two workers; the calls that change something are in `told`."""

    daemon_threads = True

    def __init__(self, path: str) -> None:
        super().__init__(path, Handler)
        self.told: list[str] = []
        self.filters: dict[str, Any] = {}


class Handler(BaseHTTPRequestHandler):
    server: Engine

    def address_string(self) -> str:
        return "unix"

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        address = urllib.parse.urlsplit(self.path)
        if address.path == "/containers/json":
            query = urllib.parse.parse_qs(address.query)
            self.server.filters = json.loads(query["filters"][0])
            found = [{"Id": each, "Names": [f"/{name}"]} for each, name in NAMES.items()]
            self._answer(200, found)
        else:
            labels = {"com.docker.compose.project": "here"}
            self._answer(200, {"Config": {"Labels": labels}})

    def do_POST(self) -> None:
        self.server.told.append(self.path)
        # The second time nobody is there any more.
        gone = "kill" in self.path and self.server.told.count(self.path) > 1
        self._answer(*((409, {"message": "is not running"}) if gone else (204, None)))

    def _answer(self, status: int, content: object) -> None:
        body = b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    with Engine(str(tmp_path / "engine.sock")) as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def run(engine: Engine, **settings: str) -> tuple[int, list[Any], str]:
    """Exit code, the lines that were written, and standard error."""
    done = subprocess.run(
        [sys.executable, "-P", str(REPOSITORY / "deploy/chaos/kill_workers.py")],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={
            "CHAOS_SOCKET": str(engine.server_address),
            "CHAOS_EVERY_S": "0",
            "CHAOS_DOWN_S": "0",
            "CHAOS_SEED": "7",
            **settings,
        },
    )
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def test_a_worker_of_its_own_project_is_killed_and_started(engine: Engine) -> None:
    code, lines, _ = run(engine, CHAOS_KILLS="1")
    assert code == 0
    assert engine.filters["status"] == ["running"]
    assert engine.filters["label"] == [
        "com.docker.compose.project=here",
        "com.docker.compose.service=worker",
    ]
    victim = lines[0]["container"]
    (container,) = (each for each, name in NAMES.items() if name == victim)
    assert engine.told == [
        f"/containers/{container}/kill?signal=KILL",
        f"/containers/{container}/start",
    ]
    assert lines == [
        {"event": "killed", "container": victim},
        {"event": "started", "container": victim},
    ]


def test_one_seed_is_one_schedule(engine: Engine) -> None:
    drawn = []
    for seed in ("1", "2", "1", "2"):
        drawn.append(run(engine, CHAOS_KILLS="1", CHAOS_SEED=seed)[1])
        engine.told.clear()
    assert drawn[:2] == drawn[2:]


def test_what_the_engine_refuses_ends_it_with_the_reason(engine: Engine) -> None:
    """The engine's restart policy tries again."""
    code, _, said = run(engine, CHAOS_KILLS="9")
    assert code == 1
    assert "409" in said
    assert "is not running" in said
