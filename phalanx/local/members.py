"""One member process of a local cluster: how it is started, watched and ended."""

import json
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from phalanx.forking.client import ForkedProcess
from phalanx.local.forks import ForkServer
from phalanx.local.restarts import RestartPolicy
from phalanx.local.state import Member

LOG_LIMIT_BYTES = 16 * 1024 * 1024
_TAIL_BYTES = 4096


@dataclass(frozen=True)
class MemberPlan:
    """What is the same at each start: ``arguments`` come after ``python -P -m``, ``imports`` are
    the modules that this needs."""

    role: str
    id: str
    arguments: tuple[str, ...]
    log: Path
    announce: Path
    imports: tuple[str, ...] = ()


class MemberProcess:
    """A member and its present process, if it has one. Not thread-safe: one thread owns it."""

    def __init__(self, plan: MemberPlan, server: ForkServer, cwd: Path) -> None:
        self.plan = plan
        self.policy = RestartPolicy()
        self.restarts = 0
        self.start_at_s: float | None = 0.0
        """When to start it next; None while it runs or shall stay down."""
        self.process: ForkedProcess | None = None
        self.announced: Mapping[str, object] | None = None
        self._server = server
        self._cwd = cwd
        self._started_at_s = 0.0

    @property
    def pid(self) -> int:
        """Process id, 0 while it is down."""
        return self.process.pid if self.process is not None else 0

    def start(self) -> None:
        """Start the process.

        It gets a session of its own, so that a Ctrl-C in the terminal reaches the supervisor only,
        and dies when this process dies.
        """
        _bound_log(self.plan.log)
        if not self.restarts:
            # That of another cluster, whose process ids may be the same. Later it is written over,
            # which works on a full disk too.
            self.plan.announce.unlink(missing_ok=True)
        self.announced = None
        self.start_at_s = None
        self._started_at_s = time.monotonic()
        module, *arguments = self.plan.arguments
        arguments += ["--id", self.plan.id, "--announce", str(self.plan.announce)]
        with open(self.plan.log, "ab") as log:
            self.process = self._server.fork(
                module,
                arguments,
                imports=self.plan.imports,
                cwd=self._cwd,
                log=log.fileno(),
            )

    def look_for_announcement(self) -> bool:
        """Return whether the process has said that it is ready."""
        if self.announced is None and self.process is not None:
            try:
                announced = json.loads(self.plan.announce.read_text())
                # Until then it is what the process before said.
                if announced["pid"] == self.pid:
                    self.announced = announced
            except (OSError, ValueError, KeyError, TypeError):
                return False
        return self.announced is not None

    def collect(self) -> int | None:
        """Return the exit code of a process that has ended (once), else None."""
        if self.process is None:
            return None
        code = self.process.poll()
        if code is not None:
            self.process = None
            self.announced = None
        return code

    def plan_restart(self) -> None:
        """Set when to start it again after its death."""
        self.restarts += 1
        self.policy, self.start_at_s = self.policy.after_death(self._started_at_s, time.monotonic())

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process, if there is one."""
        if self.process is not None:
            self.process.send_signal(number)

    def wait(self, deadline_s: float) -> bool:
        """Wait for the end of the process until a time of the monotonic clock; return whether it
        ended."""
        if self.process is not None:
            if not self.process.wait(max(deadline_s - time.monotonic(), 0.0)):
                return False
            self.collect()
        return True

    def describe(self) -> Member:
        """Return what other programs may know of it."""
        announced = self.announced or {}
        return Member(
            role=self.plan.role,
            id=self.plan.id,
            pid=self.pid,
            address=str(announced.get("address") or ""),
            metrics_address=str(announced.get("metrics_address") or ""),
            restarts=self.restarts,
            log=str(self.plan.log),
        )

    def log_tail(self) -> str:
        """Return the last lines of its log, for messages."""
        try:
            with open(self.plan.log, "rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - _TAIL_BYTES))
                lines = log.read().decode(errors="replace").strip().splitlines()
        except OSError:
            return ""
        return "\n".join(lines[-12:])


def _bound_log(log: Path) -> None:
    """Keep at most one older log beside the present one."""
    try:
        if log.stat().st_size > LOG_LIMIT_BYTES:
            log.replace(log.with_suffix(".old.log"))
    except FileNotFoundError:
        return
