"""Members as forks of one server process."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from phalanx.blas import ENVIRONMENT as ONE_BLAS_THREAD
from phalanx.forking import client
from phalanx.forking.client import ForkedProcess

ANSWER_TIMEOUT_S = 30.0
"""Covers the imports of all members on a slow disk."""


class ForkServer(client.ForkServer):
    """Starts member processes. Not thread-safe; the operating system ends all of them, and the
    server, when the thread that started the first one ends."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        super().__init__(ANSWER_TIMEOUT_S)
        # BLAS reads these when NumPy is imported, which happens in the server.
        self._environment = {**environment, **ONE_BLAS_THREAD}

    def fork(
        self, module: str, arguments: Sequence[str], *, imports: Sequence[str], cwd: Path, log: int
    ) -> ForkedProcess:
        """Start ``python -P -m module arguments --parent-pid PID`` with its output into ``log``.

        ``imports`` are modules that the server loads before. Raises OSError where there is no
        memory or no process slot, and where the server is dead: the next call starts a new one.
        """
        if self._server is None:
            self._start_server(log)
        plan = {
            "module": module,
            "arguments": list(arguments),
            "imports": list(imports),
            "cwd": str(cwd),
        }
        return self._fork(plan, [log])

    def _start_server(self, log: int) -> None:
        # It has all three streams, also where this program has none: members inherit them. What it
        # has to complain of is in the log of the first member that it was to start.
        self._start(
            lambda _, theirs: subprocess.Popen(
                [sys.executable, "-P", "-m", "phalanx.local.fork_server", str(os.getpid())],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=log,
                env=self._environment,
                start_new_session=True,
            )
        )
