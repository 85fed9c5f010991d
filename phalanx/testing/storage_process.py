"""A real storage process for tests: started, killed without mercy, started again.

with StorageProcess(tmp_path / "state") as storage:
    client = SyncStorageClient(storage.address)
    ...
    storage.kill()
    storage.start()          # the same state, another port
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

READY_S = 60.0
"""Longest wait for a process to begin or to end; a guard against a hang, not a measure."""


class StorageProcess:
    """``python -P -m storage`` on a state folder.

    ``arguments`` are added to its command line, ``environment`` to its environment; ``wrapper`` is
    put before the command (``strace …``). It listens on a free port unless ``listen`` says where.
    """

    def __init__(
        self,
        state: Path,
        *,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        wrapper: Sequence[str] = (),
        listen: str = "127.0.0.1:0",
        start: bool = True,
    ) -> None:
        self.state = state
        self.address = ""
        self.metrics_address = ""
        self.pid = 0
        self._arguments = list(arguments)
        self._environment = dict(environment or {})
        self._wrapper = list(wrapper)
        self._listen = listen
        self._files = tempfile.TemporaryDirectory(prefix="phalanx-storage-")
        self._process: subprocess.Popen[bytes] | None = None
        if start:
            self.start()

    def start(self) -> None:
        """Start it and wait until it serves; RuntimeError with its log if it ends instead."""
        self.spawn()
        announcement = self._announcement
        deadline = time.monotonic() + READY_S
        while not announcement.exists():
            if self.running() and time.monotonic() < deadline:
                time.sleep(0.005)
                continue
            code = self.kill()
            raise RuntimeError(f"storage ended with {code} before it was ready:\n{self.log()}")
        facts = json.loads(announcement.read_text())
        self.address, self.metrics_address = facts["address"], facts["metrics_address"]
        self.pid = facts["pid"]

    def spawn(self) -> None:
        """Start it and do not wait."""
        self._announcement.unlink(missing_ok=True)
        command = [
            *self._wrapper,
            *(sys.executable, "-P", "-m", "storage"),
            *("--state", str(self.state), "--listen", self._listen),
            *("--announce", str(self._announcement), *self._arguments),
        ]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            **self._environment,
        }
        with self._log_path.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        self.pid = self._process.pid

    def running(self) -> bool:
        """Return whether the process has not ended."""
        return self._process is not None and self._process.poll() is None

    def wait(self) -> int:
        """Wait for its end; return its exit code (negative: the signal)."""
        assert self._process is not None
        return self._process.wait(READY_S)

    def kill(self) -> int | None:
        """Send SIGKILL, to the wrapper's child too, and wait; return the exit code."""
        if self._process is None:
            return None
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        return self.wait()

    def stop(self) -> int:
        """Send SIGTERM and wait; return the exit code."""
        assert self._process is not None
        os.kill(self.pid, signal.SIGTERM)
        return self.wait()

    def log(self) -> str:
        """Return everything it wrote to standard output and error."""
        return self._log_path.read_text(errors="replace") if self._log_path.exists() else ""

    def close(self) -> None:
        """Kill it and remove its log."""
        self.kill()
        self._files.cleanup()

    def __enter__(self) -> Self:
        """Return the process."""
        return self

    def __exit__(self, *_: object) -> None:
        """Leave nothing behind."""
        self.close()

    @property
    def _announcement(self) -> Path:
        return Path(self._files.name) / "announcement.json"

    @property
    def _log_path(self) -> Path:
        return Path(self._files.name) / "log"
