"""Kills a container of this compose project every now and then, and starts it again.

The service `chaos` of deploy/compose.yaml runs it. It needs only the interpreter and the engine's
socket. Who is killed, and when, is written to standard output. Settings, from the environment:

    CHAOS_SERVICES   which services, comma separated (worker)
    CHAOS_EVERY_S    time between kills (20)
    CHAOS_DOWN_S     how long the victim stays dead (5)
    CHAOS_KILLS      end after so many kills; 0 for never (0)
    CHAOS_SOCKET     where the engine listens (/var/run/docker.sock)
    CHAOS_SEED       the same seed draws alike where the containers are the same
"""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import socket
import sys
import threading
import urllib.parse
from typing import Any

SOCKET = "/var/run/docker.sock"
PROJECT, SERVICE = "com.docker.compose.project", "com.docker.compose.service"
CALL_TIMEOUT_S = 30.0


class EngineConnection(http.client.HTTPConnection):
    """HTTP over the engine's socket."""

    def __init__(self, path: str) -> None:
        super().__init__("engine", timeout=CALL_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        """Open the connection."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Engine:
    """The few calls to a container engine that are needed here."""

    def __init__(self, path: str) -> None:
        self._path = path

    def project_of(self, container: str) -> str:
        """Return the compose project that a container belongs to."""
        found = self._call("GET", f"/containers/{container}/json")
        return str(found["Config"]["Labels"][PROJECT])

    def running(self, project: str, service: str) -> list[tuple[str, str]]:
        """Return id and name of each running container of a service, in the order of names."""
        labels = [f"{PROJECT}={project}", f"{SERVICE}={service}"]
        filters = json.dumps({"label": labels, "status": ["running"]})
        found = self._call(
            "GET", "/containers/json?" + urllib.parse.urlencode({"filters": filters})
        )
        return sorted(((each["Id"], each["Names"][0].lstrip("/")) for each in found), key=_by_name)

    def kill(self, container: str) -> None:
        """Do what `kill -9` does to all processes of a container."""
        self._call("POST", f"/containers/{container}/kill?signal=KILL")

    def start(self, container: str) -> None:
        """Start a container that has ended: no restart policy does that after a kill by hand."""
        self._call("POST", f"/containers/{container}/start")

    def _call(self, method: str, path: str) -> Any:
        connection = EngineConnection(self._path)
        try:
            connection.request(method, path)
            response = connection.getresponse()
            content = response.read()
        finally:
            connection.close()
        # 304: it runs already.
        if response.status >= 400:
            text = content.decode(errors="replace").strip()
            raise RuntimeError(f"{method} {path}: {response.status} {text}")
        return json.loads(content) if content else None


def _by_name(container: tuple[str, str]) -> str:
    return container[1]


def main() -> int:
    """Kill until told to stop; leave nobody dead."""
    services = os.environ.get("CHAOS_SERVICES", "worker").split(",")
    every_s = float(os.environ.get("CHAOS_EVERY_S", "20"))
    down_s = float(os.environ.get("CHAOS_DOWN_S", "5"))
    kills = int(os.environ.get("CHAOS_KILLS", "0"))
    chance = random.Random(os.environ.get("CHAOS_SEED"))
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    engine = Engine(os.environ.get("CHAOS_SOCKET", SOCKET))
    project = engine.project_of(socket.gethostname())
    killed = 0
    while not stop.wait(every_s):
        running = [each for service in services for each in engine.running(project, service)]
        if not running:
            say("nobody runs")
            continue
        container, name = chance.choice(running)
        say("killed", name)
        engine.kill(container)
        try:
            stop.wait(down_s)
        finally:
            engine.start(container)
            say("started", name)
        killed += 1
        if killed == kills:
            break
    return 0


def say(event: str, container: str = "") -> None:
    """Write a line for machines."""
    print(json.dumps({"event": event, "container": container}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
