"""An asyncio loop on a virtual clock, shared by simulated processes that can be killed and paused.

Nothing waits: when no callback is ready the clock jumps to the next timer. Every callback belongs
to the process that scheduled it. Those of a dead process are dropped; those of a paused one are
kept until it goes on, by when its timers are late, as after SIGSTOP.

Runs are exact: callbacks run in the order in which they were scheduled, tasks hash by number
instead of by address, and cyclic garbage is collected between runs only.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import itertools
import random
import struct
import sys
import warnings
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from contextlib import suppress
from functools import partial
from heapq import heappop, heappush
from typing import Any

HANDLES_AT_ONE_INSTANT_MAX = 200_000
"""More callbacks without the clock moving mean that something spins."""

_EXECUTOR_S = (0.0001, 0.002)
_NOTE = struct.Struct("<dqI")
_TRACE_BYTES = 65_536
_TASKS_KEPT = 64
_WHEN_S, _, _CALLBACK, _, _PROCESS = range(5)


class SimulationFailed(AssertionError):
    """The simulated programs, or the simulation itself, did what must not happen."""


class Killed(BaseException):
    """Unwinds the code of a process that ended itself."""


class Process:
    """A simulated process. `wall_offset_ns` is how wrong its wall clock is."""

    def __init__(self, name: str, number: int) -> None:
        self.name = name
        self.number = number
        self.alive = True
        self.paused = False
        self.wall_offset_ns = 0
        self.deferred: list[_Handle] = []
        self.tasks: list[weakref.ref[_Task]] = []
        self.on_death: list[Callable[[], None]] = []

    def __repr__(self) -> str:
        return f"<{self.name}#{self.number}>"


class _Handle(list[Any]):
    """A callback of a process, as far as programs know asyncio.Handle: due when, number, callback
    (None: cancelled), arguments, process.

    A list, since a run makes very many: they are made and compared without any Python code.
    """

    __slots__ = ()
    __hash__ = object.__hash__  # type: ignore[assignment]

    def cancel(self) -> None:
        self[_CALLBACK] = None

    def cancelled(self) -> bool:
        return self[_CALLBACK] is None

    def when(self) -> float:
        when_s: float = self[_WHEN_S]
        return when_s


class _Task(asyncio.Task[Any]):
    """A task whose place in a set does not depend on its address."""

    number = 0

    def __hash__(self) -> int:
        return self.number


class SimulatedLoop:
    """The part of an event loop that programs without sockets use."""

    def __init__(self, executor_delay_s: Callable[[], float]) -> None:
        self.now_s = 0.0
        self.current = Process("world", 0)
        self._running = False
        self._executor_delay_s = executor_delay_s
        self._ready: deque[_Handle] = deque()
        self._timers: list[_Handle] = []
        self._numbers = itertools.count(1)
        self._generators: weakref.WeakKeyDictionary[Any, Process] = weakref.WeakKeyDictionary()
        self.stopped = False
        """Whether the run ends as soon as the clock would move."""
        this: Any = self
        # Asked for with each wait, so without Python code in between.
        self.create_future: Callable[[], asyncio.Future[Any]] = partial(asyncio.Future, loop=this)

    # asyncio's side

    get_debug = bool  # no: each future asks

    def time(self) -> float:
        return self.now_s

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def call_soon(
        self, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> _Handle:
        handle = _Handle((0.0, 0, callback, args, self.current))
        self._ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon

    def call_at(
        self, when: float, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> _Handle:
        return self.call_at_for(self.current, when, callback, *args)

    def call_later(
        self, delay: float, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> _Handle:
        when_s = self.now_s + delay if delay > 0 else self.now_s
        handle = _Handle((when_s, next(self._numbers), callback, args, self.current))
        heappush(self._timers, handle)
        return handle

    def create_task(
        self, coro: Coroutine[Any, Any, Any] | Generator[Any, None, Any], **_: Any
    ) -> asyncio.Task[Any]:
        number = next(self._numbers)
        task: _Task = _Task.__new__(_Task)
        task.number = number
        task.__init__(coro, loop=self, name="")  # type: ignore[misc]
        tasks = self.current.tasks
        tasks.append(weakref.ref(task))
        if len(tasks) >= _TASKS_KEPT and not len(tasks) & (len(tasks) - 1):
            tasks[:] = [each for each in tasks if each() is not None]
        return task

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> Any:
        """Run a blocking function at one virtual instant a little later; its answer comes later."""
        future = self.create_future()

        def run() -> None:
            try:
                result = func(*args)
            except Exception as error:  # noqa: BLE001 - the waiting task gets it
                self.call_later(self._executor_delay_s(), _set_exception, future, error)
            else:
                self.call_later(self._executor_delay_s(), _set_result, future, result)

        self.call_later(self._executor_delay_s(), run)
        return future

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """What asyncio would log."""

    # The simulation's side

    def call_at_for(
        self, process: Process, when_s: float, callback: Callable[..., object], *args: Any
    ) -> _Handle:
        """Schedule a callback that belongs to a process."""
        when_s = max(when_s, self.now_s)
        handle = _Handle((when_s, next(self._numbers), callback, args, process))
        heappush(self._timers, handle)
        return handle

    def call_soon_for(
        self, process: Process, callback: Callable[..., object], *args: Any
    ) -> _Handle:
        """Schedule a callback that belongs to a process, at this instant."""
        handle = _Handle((0.0, 0, callback, args, process))
        self._ready.append(handle)
        return handle

    def interrupt(self, process: Process, callback: Callable[..., object], *args: Any) -> None:
        """Have a process take something in at once, or when it goes on."""
        if process.paused:
            process.deferred.append(_Handle((0.0, 0, callback, args, process)))
            return
        if not self._running:
            self.call_soon_for(process, callback, *args)
            return
        before, self.current = self.current, process
        callback(*args)
        self.current = before

    def resume(self, process: Process) -> None:
        """Let a paused process go on with what it missed, in order."""
        process.paused = False
        self._ready.extend(process.deferred)
        process.deferred.clear()

    def forget(self) -> None:
        """Drop every callback: they hold everything that is left of a run."""
        self._ready.clear()
        self._timers.clear()

    def run(self, until_s: float, ended: Callable[[], bool] | None) -> None:
        """Run until a time, until stopped, or until `ended()`, asked whenever the clock moved."""
        this: Any = self
        asyncio._set_running_loop(this)
        before = sys.get_asyncgen_hooks()
        sys.set_asyncgen_hooks(self._generator_begins, self._generator_left)
        self._running = True
        try:
            self._run(until_s, ended)
        finally:
            self._running = False
            sys.set_asyncgen_hooks(*before)
            asyncio._set_running_loop(None)

    def _run(self, until_s: float, ended: Callable[[], bool] | None) -> None:
        ready, timers, pop = self._ready, self._timers, heappop
        while True:
            if ready:
                self._run_ready()
            while timers and (timers[0][_CALLBACK] is None or not timers[0][_PROCESS].alive):
                pop(timers)
            if not timers or timers[0][_WHEN_S] > until_s:
                self.now_s = max(self.now_s, until_s)
                return
            handle = pop(timers)
            self.now_s = now_s = handle[_WHEN_S]
            ready.append(handle)
            while timers and timers[0][_WHEN_S] <= now_s:
                ready.append(pop(timers))
            if self.stopped or (ended is not None and ended()):
                return

    def _run_ready(self) -> None:
        """Run everything at this instant, and what follows from it at once."""
        ready = self._ready
        take = ready.popleft
        count = 0
        while ready:
            handle = take()
            _, _, callback, args, process = handle
            if callback is None or not process.alive:
                continue
            if process.paused:
                process.deferred.append(handle)
                continue
            count += 1
            self.current = process
            try:
                callback(*args)
            except Killed:
                continue
            if count > HANDLES_AT_ONE_INSTANT_MAX:
                raise SimulationFailed(f"{process.name} spins at {self.now_s:.3f} s")

    def _generator_begins(self, generator: AsyncGenerator[Any, Any]) -> None:
        self._generators[generator] = self.current

    def _generator_left(self, generator: AsyncGenerator[Any, Any]) -> None:
        owner = self._generators.get(generator)
        if owner is not None and owner.alive:
            before, self.current = self.current, owner
            self.create_task(generator.aclose())
            self.current = before


class World:
    """One run: a clock, chance, processes, and a hash of everything that happened."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.chance = random.Random(f"chance {seed}")
        self.jitter = random.Random(f"jitter {seed}")
        self.loop = SimulatedLoop(lambda: self.jitter.uniform(*_EXECUTOR_S))
        self.outside = self.loop.current
        self.processes: list[Process] = []
        self.transitions = 0
        self.log: Callable[[str], None] | None = None
        self.failure: SimulationFailed | None = None
        """The first thing that must not happen and did; the run ends with it."""
        self._untold = bytearray()
        self._trace = hashlib.blake2b(digest_size=16)
        self._numbers = itertools.count(1)

    @property
    def now_s(self) -> float:
        """Virtual seconds since the run began."""
        return self.loop.now_s

    @property
    def trace_hash(self) -> str:
        """Equal for two runs exactly if they did the same."""
        self._trace.update(self._untold)
        self._untold.clear()
        return self._trace.hexdigest()

    def fail(self, error: SimulationFailed) -> None:
        """End the run as failed. The programs may catch what is raised in them; this stays."""
        if self.failure is None:
            self.failure = error
            self.loop.stopped = True
            self.say(f"FAILED: {error}")

    def note(self, number: int, data: bytes) -> None:
        """Add something that happened to the trace."""
        trace = self._untold
        trace += _NOTE.pack(self.loop.now_s, number, len(data))
        trace += data
        if len(trace) > _TRACE_BYTES:
            self._trace.update(trace)
            trace.clear()

    def say(self, text: str) -> None:
        """Tell people who replay a run what happens."""
        if self.log is not None:
            self.log(f"{self.now_s:9.4f} {text}")

    def start(self, name: str, main: Callable[[], Coroutine[Any, Any, Any]]) -> Process:
        """Start a process: `main` runs in it."""
        process = Process(name, next(self._numbers))
        self.processes.append(process)
        self.note(process.number, b"start " + name.encode())
        self.say(f"{name} starts")
        self.run_as(process, lambda: self._begin(process, main))
        return process

    def _begin(self, process: Process, main: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        task = self.loop.create_task(main())
        task.add_done_callback(lambda done: self._main_ended(process, done))

    def _main_ended(self, process: Process, task: asyncio.Task[Any]) -> None:
        error = None if task.cancelled() else task.exception()
        if isinstance(error, SimulationFailed):
            self.fail(error)
        elif error is not None:
            self.say(f"{process.name} ends with {error!r}")
        self.kill(process)

    def run_as(self, process: Process, act: Callable[[], None]) -> None:
        """Run something as a part of a process, now."""
        before, self.loop.current = self.loop.current, process
        running = asyncio._get_running_loop()
        loop: Any = self.loop
        asyncio._set_running_loop(loop)
        try:
            act()
        finally:
            asyncio._set_running_loop(running)
            self.loop.current = before

    def kill(self, process: Process) -> None:
        """End a process as SIGKILL does: nothing of it runs any more, its sockets are closed."""
        if not process.alive:
            return
        process.alive = False
        self.note(process.number, b"killed")
        self.say(f"{process.name} is gone")
        for notify in process.on_death:
            notify()
        process.on_death.clear()
        self.run_as(process, lambda: self._unwind(process))
        # Not before: of tasks that have not begun, nobody else may know.
        process.deferred.clear()

    def _unwind(self, process: Process) -> None:
        # Coroutines that the collector finds later would run their last lines at some other time.
        log, self.log = self.log, None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a dying program begins, nobody awaits
            last = -1
            # Cleaning up begins tasks, which never run: they are closed as well.
            while tasks := [
                task
                for each in process.tasks
                if (task := each()) is not None and task.number > last
            ]:
                for task in tasks:
                    last = task.number
                    task._log_destroy_pending = False  # type: ignore[attr-defined]
                    with suppress(BaseException):
                        task.get_coro().close()
        self.log = log

    def end_self(self) -> None:
        """What `os._exit` does, called by the process itself."""
        self.kill(self.loop.current)
        raise Killed

    def pause(self, process: Process) -> None:
        """Stop a process as SIGSTOP does."""
        process.paused = True
        self.note(process.number, b"paused")
        self.say(f"{process.name} is paused")

    def resume(self, process: Process) -> None:
        """Let it go on as SIGCONT does."""
        if process.paused:
            self.note(process.number, b"resumed")
            self.say(f"{process.name} goes on")
            self.loop.resume(process)

    def at(self, when_s: float, act: Callable[[], None]) -> None:
        """Do something from outside of all processes."""
        self.loop.call_at_for(self.outside, when_s, act)

    def stop(self) -> None:
        """End this run, or else the next one, before the clock moves again."""
        self.loop.stopped = True

    def run(self, until_s: float, ended: Callable[[], bool] | None = None) -> None:
        """Run until a virtual time, `stop` or `ended()`."""
        collects = gc.isenabled()
        gc.disable()
        try:
            self.loop.run(until_s, ended)
        finally:
            self.loop.stopped = self.failure is not None
            if collects:
                gc.enable()

    def close(self) -> None:
        """End all processes, and let go of what they still waited for."""
        for process in self.processes:
            self.kill(process)
        self.loop.forget()


def _set_result(future: asyncio.Future[Any], result: Any) -> None:
    if not future.done():
        future.set_result(result)


def _set_exception(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
