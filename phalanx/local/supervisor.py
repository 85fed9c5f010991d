"""Starts the processes of a local cluster, starts again what dies, and ends them all.

One thread owns every process: it has them started by a fork server (the operating system kills a
child when the *thread* that started it ends), waits for deaths without polling, and ends them.
Other threads only send it commands.
"""

import contextlib
import os
import queue
import random
import select
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import IO, TypeVar

import phalanx
from phalanx.errors import DeadlineExceeded, FailedPrecondition, NotFound, PhalanxError, Unavailable
from phalanx.local.forks import ForkServer
from phalanx.local.keys import make_keys
from phalanx.local.layout import WORKER, Layout
from phalanx.local.members import MemberPlan, MemberProcess
from phalanx.local.options import LocalOptions
from phalanx.local.state import ClusterState, Member, lock, remove_state, unlock, write_state

START_TIMEOUT_S = 60.0
DRAIN_S = 3.0
STOP_S = 3.0
_DEATHS_AT_START_MAX = 3
_PORT_ROUNDS = 3
_LOOK_S = 0.02
_EXIT_USAGE = 2
_PORT_TAKEN = "PORT_TAKEN"

ResultT = TypeVar("ResultT")


class Supervisor:
    """A cluster on this machine. Call ``start`` once, then ``stop``."""

    def __init__(
        self, options: LocalOptions, *, on_remark: Callable[[str], None] | None = None
    ) -> None:
        self.options = options
        self._on_remark = on_remark
        self.layout = Layout.choose(options)
        self._members: list[MemberProcess] = []
        self._server = ForkServer({**os.environ, **options.environment})
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._ready: Future[None] = Future()
        self._ended = threading.Event()
        self._stopping = False
        self._hurry = threading.Event()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        self._pipe_lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="phalanx-supervisor", daemon=True)
        self._lock_file: IO[bytes] | None = None
        self._start_unix_s = time.time()
        self._next_worker = options.workers

    @classmethod
    def launch(
        cls,
        options: LocalOptions,
        timeout_s: float = START_TIMEOUT_S,
        *,
        on_remark: Callable[[str], None] | None = None,
    ) -> "Supervisor":
        """Start a cluster; as ``start``, but again with other ports when another program was
        quicker.

        ``on_remark`` is told of deaths and restarts, in the supervisor's thread.
        """
        for _ in range(_PORT_ROUNDS - 1):
            supervisor = cls(options, on_remark=on_remark)
            try:
                supervisor.start(timeout_s)
            except FailedPrecondition as error:
                if error.reason != _PORT_TAKEN:
                    raise
            else:
                return supervisor
        supervisor = cls(options, on_remark=on_remark)
        supervisor.start(timeout_s)
        return supervisor

    @property
    def address(self) -> str:
        """Where clients reach the cluster; several control processes are a comma separated list."""
        return ",".join(self.layout.client_addresses)

    def start(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Start all processes and return once each has said that it is ready.

        Raises FailedPrecondition when the state folder is taken or a process cannot run, with the
        end of its log; DeadlineExceeded after ``timeout_s``. Nothing is left behind then.
        """
        try:
            self._lock_file = lock(self.options.state_dir)
        except BaseException:
            self._close_pipe()
            raise
        # The file of a supervisor that was killed; the lock says that nobody runs here any more.
        remove_state(self.options.state_dir)
        for folder in ("logs", "run", "cache"):
            (self.options.state_dir / folder).mkdir(exist_ok=True)
        self._make_keys()
        self._thread.start()
        try:
            self._ready.result(timeout_s)
        except TimeoutError:
            waiting = ", ".join(member.id for member in self.members() if not member.address)
            self.stop(hurry=True)
            raise DeadlineExceeded(
                f"the cluster was not ready after {timeout_s:g} s; still waited for: {waiting}; "
                f"their logs are in {self.options.state_dir / 'logs'}"
            ) from None
        except BaseException:
            self.stop(hurry=True)
            raise

    def stop(self, *, hurry: bool = False) -> None:
        """End all processes: workers finish their leaves first unless in a ``hurry``. Harmless when
        repeated."""
        if hurry:
            self._hurry.set()
        if self._thread.ident is None:
            self._release()
            self._close_pipe()
            return
        self._post(self._begin_stop)
        try:
            self._ended.wait()
        except KeyboardInterrupt:
            self._hurry.set()
            self._ended.wait()
            raise

    def hurry(self) -> None:
        """Let a stop that is under way kill what has not ended yet."""
        self._hurry.set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Block until the cluster has ended; return whether it has."""
        return self._ended.wait(timeout_s)

    def members(self) -> list[Member]:
        """Return all processes as they are now."""
        return [member.describe() for member in list(self._members)]

    def member(self, id: str) -> Member:
        """Return one process by its id. Raises NotFound."""
        for member in self.members():
            if member.id == id:
                return member
        raise NotFound(
            f"this cluster has no process {id!r}; it has "
            + ", ".join(member.id for member in self.members())
        )

    def add_worker(self) -> str:
        """Start one more worker; return its id at once."""
        return self._ask(self._add_worker)

    # From here on everything runs in the supervisor's own thread.

    def _run(self) -> None:
        try:
            self._start_members()
            while not self._stopping:
                self._wait_for_something()
                self._serve_commands()
                self._collect_deaths()
                self._start_due()
                self._note_announcements()
        except PhalanxError as error:
            if not self._ready.done():
                self._ready.set_exception(error)
        finally:
            with contextlib.ExitStack() as end:
                # The last one first: whoever waits for the end must not wait for ever.
                end.callback(self._close_pipe)
                end.callback(self._release)
                end.callback(self._server.close)
                self._end_members()
            if not self._ready.done():
                self._ready.set_exception(
                    Unavailable("the cluster was stopped before it was ready")
                )

    def _start_members(self) -> None:
        self._members = [self._new_member(plan) for plan in self.layout.members()]
        self._start_due()

    def _wait_for_something(self) -> None:
        """Sleep until a process ends, a command comes, a restart is due, or it is time to look for
        files."""
        poller = select.poll()
        poller.register(self._wake_read, select.POLLIN)
        for member in self._members:
            if member.process is not None:
                poller.register(member.process.handle, select.POLLIN)
        timeout_s = self._next_look_s()
        poller.poll(None if timeout_s is None else timeout_s * 1000)

    def _next_look_s(self) -> float | None:
        if any(member.pid and member.announced is None for member in self._members):
            return _LOOK_S
        starts = [member.start_at_s for member in self._members if member.start_at_s is not None]
        return max(min(starts) - time.monotonic(), 0.0) if starts else None

    def _serve_commands(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_read, 4096)
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            command()

    def _collect_deaths(self) -> None:
        changed = False
        for member in list(self._members):
            code = member.collect()
            if code is None:
                continue
            changed = True
            if not self._ready.done():
                self._judge_early_death(member, code)
            if member.plan.role == WORKER and code == 0:
                # It was drained, and left: that is what the operator wanted.
                self._members.remove(member)
                self._remark(f"{member.plan.id} has left")
            else:
                member.plan_restart()
                how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
                self._remark(f"{member.plan.id} {how}; it is started again")
        if changed:
            self._write_state()

    def _judge_early_death(self, member: MemberProcess, code: int) -> None:
        """Give up on a process that cannot run: told at once, not after a minute of restarts."""
        if code == _EXIT_USAGE or member.restarts + 1 >= _DEATHS_AT_START_MAX:
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            tail = member.log_tail()
            raise FailedPrecondition(
                f"{member.plan.id} cannot run ({how}); the end of its log:\n{tail}",
                reason=_PORT_TAKEN if "in use" in tail else "MEMBER_CANNOT_RUN",
            )

    def _start_due(self) -> None:
        now_s = time.monotonic()
        for member in self._members:
            if member.start_at_s is not None and member.start_at_s <= now_s:
                try:
                    member.start()
                except OSError as error:
                    # No memory or no process slot at the moment; others may free some.
                    member.start_at_s = now_s + random.uniform(0.5, 1.0)
                    if not self._ready.done():
                        raise FailedPrecondition(
                            f"cannot start {member.plan.id}: {error}", reason="MEMBER_CANNOT_RUN"
                        ) from error

    def _note_announcements(self) -> None:
        waiting = [member for member in self._members if member.announced is None]
        if not [member for member in waiting if member.look_for_announcement()]:
            return
        everyone = all(member.announced is not None for member in self._members)
        self._write_state(ready=everyone or self._ready.done())
        if everyone and not self._ready.done():
            self._ready.set_result(None)

    def _add_worker(self) -> str:
        plan = self.layout.worker(self._next_worker)
        self._next_worker += 1
        self._members.append(self._new_member(plan))
        return plan.id

    def _new_member(self, plan: MemberPlan) -> MemberProcess:
        return MemberProcess(plan, self._server, self.options.state_dir)

    def _begin_stop(self) -> None:
        self._stopping = True

    def _end_members(self) -> None:
        """End workers first, storage last, so that each can still save what it wants to save."""
        for roles, grace_s in (
            ({WORKER}, DRAIN_S),
            ({"aggregator", "control"}, STOP_S),
            ({"storage"}, STOP_S),
        ):
            self._end([m for m in self._members if m.plan.role in roles], grace_s)
        self._members.clear()

    def _end(self, members: list[MemberProcess], grace_s: float) -> None:
        deadline_s = time.monotonic() + grace_s
        for member in members:
            member.signal(signal.SIGTERM)
            # One that is stopped (SIGSTOP) must wake up to hear it.
            member.signal(signal.SIGCONT)
        for member in members:
            while not member.wait(min(time.monotonic() + 0.1, deadline_s)):
                if self._hurry.is_set() or time.monotonic() >= deadline_s:
                    member.signal(signal.SIGKILL)
                    member.wait(time.monotonic() + STOP_S)
                    break

    def _make_keys(self) -> None:
        if self.options.keys_dir is not None:
            try:
                make_keys(self.options.keys_dir)
            except BaseException:
                self._release()
                self._close_pipe()
                raise

    def _release(self) -> None:
        if self._lock_file is not None:
            remove_state(self.options.state_dir)
            unlock(self._lock_file)
            self._lock_file = None

    def _close_pipe(self) -> None:
        with self._pipe_lock:
            if not self._ended.is_set():
                os.close(self._wake_read)
                os.close(self._wake_write)
                self._ended.set()

    def _write_state(self, ready: bool | None = None) -> None:
        state = ClusterState(
            pid=os.getpid(),
            address=self.address,
            storage_address=self.layout.client_storage_address,
            version=phalanx.__version__,
            start_unix_s=self._start_unix_s,
            ready=self._ready.done() if ready is None else ready,
            members=tuple(member.describe() for member in self._members),
            keys_dir=str(self.options.keys_dir or ""),
        )
        try:
            write_state(self.options.state_dir, state)
        except OSError:
            # A full disk must not take the cluster down; the file is for information only.
            return

    def _remark(self, text: str) -> None:
        if self._on_remark is not None and self._ready.done():
            # Whoever listens may fail for reasons of their own; members must not pay for it.
            with contextlib.suppress(Exception):
                self._on_remark(text)

    def _post(self, command: Callable[[], None]) -> None:
        with self._pipe_lock:
            if not self._ended.is_set():
                self._commands.put(command)
                os.write(self._wake_write, b"\0")

    def _ask(self, command: Callable[[], ResultT]) -> ResultT:
        answer: Future[ResultT] = Future()

        def run() -> None:
            answer.set_result(command())

        self._post(run)
        try:
            return answer.result(STOP_S)
        except TimeoutError:
            raise Unavailable("the cluster has ended or is just ending") from None
