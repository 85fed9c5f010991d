"""A real S3 server process on loopback for tests, which honours conditional writes.

with ObjectServer() as server:
    os.environ |= server.environment
    url = server.create_bucket("one")           # s3://one
    server.disturb(Fault(method="PUT", query="partNumber=2", status=500, times=3))

It is moto's server, with faults on demand before it. Objects are in its memory: a killed one has
lost them all.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from phalanx.parent import die_with_parent

if TYPE_CHECKING:
    from obstore.store import S3Store

READY_S = 60.0
"""Longest wait for the server to begin; a guard against a hang, not a measure."""

_FAULTS_PATH = "/-/faults"
_NEEDED = ("moto", "flask", "flask_cors")


@dataclass(frozen=True)
class Fault:
    """What happens to requests of a method whose path and query contain these texts."""

    method: str = ""
    path: str = ""
    query: str = ""
    status: int = 0
    """Answered instead of doing anything; 0: the request is carried out."""
    delay_s: float = 0.0
    """Before that; new faults, or none, end the wait."""
    times: int = -1
    """So many requests; -1 for all."""


def why_not() -> str:
    """Return why no server can run here, or nothing."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    return f"{', '.join(missing)} not installed" if missing else ""


class ObjectServer:
    """One server process; use it in a ``with``."""

    def __init__(self) -> None:
        self._files = tempfile.TemporaryDirectory(prefix="phalanx-objects-")
        self._process: subprocess.Popen[bytes] | None = None
        self.address = ""

    @property
    def environment(self) -> dict[str, str]:
        """What a client's environment says of it."""
        return {
            "AWS_ACCESS_KEY_ID": "tests",
            "AWS_SECRET_ACCESS_KEY": "tests",
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://{self.address}",
        }

    def create_bucket(self, name: str) -> str:
        """Make an empty bucket; return its URL."""
        self._send("PUT", f"/{name}")
        return f"s3://{name}"

    def disturb(self, *faults: Fault) -> None:
        """Replace the faults that requests meet from now on; none to heal all."""
        self._send("PUT", _FAULTS_PATH, json.dumps([asdict(fault) for fault in faults]).encode())

    def get(self, bucket: str, key: str) -> bytes:
        """Return an object as the server has it."""
        import obstore

        return bytes(obstore.get(self._bucket(bucket), key).bytes())

    def put(self, bucket: str, key: str, content: bytes) -> None:
        """Store an object."""
        import obstore

        obstore.put(self._bucket(bucket), key, content)

    def parts_without_end(self, bucket: str) -> bool:
        """Whether there are parts of uploads that were neither completed nor aborted."""
        return b"<UploadId>" in self._send("GET", f"/{bucket}?uploads")

    def keys(self, bucket: str) -> list[str]:
        """Return the keys of all objects."""
        import obstore

        return sorted(
            found["path"] for page in obstore.list(self._bucket(bucket)) for found in page
        )

    def _bucket(self, name: str) -> S3Store:
        from obstore.store import S3Store

        return S3Store(
            name,
            access_key_id="tests",
            secret_access_key="tests",  # noqa: S106
            region="us-east-1",
            endpoint=f"http://{self.address}",
            client_options={"allow_http": True},
        )

    def start(self) -> None:
        """Start it and wait until it serves."""
        announced = Path(self._files.name, "address")
        with open(Path(self._files.name, "log"), "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__, str(announced), str(os.getpid())],
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                start_new_session=True,
            )
        deadline = time.monotonic() + READY_S
        while not announced.exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(
                    f"no S3 server:\n{Path(self._files.name, 'log').read_text(errors='replace')}"
                )
            time.sleep(0.01)
        self.address = announced.read_text()

    def close(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
        self._files.cleanup()

    def __enter__(self) -> Self:
        """Start it."""
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self.close()

    def _send(self, method: str, path: str, body: bytes | None = None) -> bytes:
        request = urllib.request.Request(f"http://{self.address}{path}", body, method=method)
        with urllib.request.urlopen(request, timeout=READY_S) as response:  # noqa: S310
            content: bytes = response.read()
        return content


_Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class _Faulty:
    """A WSGI application before another one."""

    def __init__(self, application: _Application) -> None:
        self._application = application
        self._mutex = threading.Lock()
        self._faults: list[tuple[Fault, list[int]]] = []
        self._replaced = threading.Event()

    def __call__(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        if environ["PATH_INFO"] == _FAULTS_PATH:
            body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
            with self._mutex:
                faults = [Fault(**each) for each in json.loads(body)]
                self._faults = [(fault, [fault.times]) for fault in faults]
                self._replaced.set()
                self._replaced = threading.Event()
            start_response("200 OK", [])
            return []
        replaced = self._replaced
        fault = self._met(environ)
        if fault is not None:
            replaced.wait(fault.delay_s)
            if fault.status:
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                start_response(f"{fault.status} Injected", [("Content-Length", "0")])
                return []
        return self._application(environ, start_response)

    def _met(self, environ: dict[str, Any]) -> Fault | None:
        with self._mutex:
            for fault, left in self._faults:
                if (
                    left[0]
                    and fault.method in environ["REQUEST_METHOD"]
                    and fault.path in environ["PATH_INFO"]
                    and fault.query in environ.get("QUERY_STRING", "")
                ):
                    left[0] -= 1
                    return fault
        return None


def _serve(announced: Path) -> None:
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    application = _Faulty(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True)
    new = announced.with_suffix(".new")
    new.write_text(f"127.0.0.1:{server.port}")
    new.rename(announced)
    server.serve_forever()


if __name__ == "__main__":
    die_with_parent(int(sys.argv[2]))
    _serve(Path(sys.argv[1]))
