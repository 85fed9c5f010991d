"""The slots of the worker: which leaf process runs what, and what happens when one dies.

A slot runs one task at a time. It has one process for all jobs without code of their own and one
for each set of user code, so that the code of two jobs never meets. One is started in advance; the
first job takes it over, whichever kind it is.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Protocol

from phalanx.errors import FailedPrecondition, InvalidArgument
from phalanx.layouts import check_description
from phalanx.specs.shard_rows import rows_of_shard
from phalanx.telemetry.logs import get_logger
from phalanx.v1 import coordination_service_pb2 as coordination
from worker import ipc
from worker.core.dispatch import Task
from worker.core.patience import Patience
from worker.core.rounds import LeafFailure, Part, PartState
from worker.gpus import gpus_of_slot
from worker.ipc import Kind, Message, Returned
from worker.session.devices import unlike
from worker.session.leaf_server import LeafServer
from worker.session.places import Place, SettingUp, SetUpFailure
from worker.session.process import LeafProcess, describe_exit
from worker.session.setup import PreparedJob

LeafFailed = coordination.LeafFailed

TICK_S = 0.1
LOST_STARTS_MAX = 3
DESCRIBE_ATTEMPTS = 2
"""Starts in a row that come to nothing before a slot, or all of them, count as out of order."""
_TICK_MAX_S = 0.5

_log = get_logger(__name__)


class SlotEvents(Protocol):
    """What the session does about the slots."""

    def slot_idle(self, slot: int) -> None:
        """The leaf process of a slot waits for work."""

    def part_done(self, task: Task, done: ipc.PartDone) -> None:
        """A part is in its buffer."""

    def call_done(self, task: Task, index: int, seconds: float, returned: Returned) -> None:
        """A call of a set of tasks returned."""

    def part_failed(self, task: Task, index: int, failure: LeafFailure) -> None:
        """A leaf of a part failed."""

    def server_died(self, task: Task, shard: int) -> bool:
        """The leaf server died while a leaf of a task ran; return whether that is to blame."""

    def task_ended(self, task: Task, lost: bool) -> None:
        """The process is through with a task, or died over it."""

    def fetch(self, process: LeafProcess, task: Task | None, document: dict[str, object]) -> None:
        """A leaf waits for a chunk."""

    def prefetch(self, document: dict[str, object]) -> None:
        """Chunks will be needed."""

    def printed(self, process: LeafProcess, level: str, data: bytes) -> None:
        """A process printed something."""

    def process_gone(self, process: LeafProcess) -> None:
        """A process has ended."""


class SlotPool:
    """Leaf processes of `count` slots. Use it in one event loop."""

    def __init__(
        self,
        count: int,
        memory_limit_bytes: int,
        leaf_timeout_s: float,
        events: SlotEvents,
        leaves: LeafServer | None = None,
        gpus: Sequence[str] = (),
    ) -> None:
        self._events = events
        self._leaves = leaves if leaves is not None else LeafServer()
        self._memory_limit_bytes = memory_limit_bytes
        self._patience = [Patience(leaf_timeout_s, _TICK_MAX_S) for _ in range(count)]
        self._leaf_timeout_s = leaf_timeout_s
        self._places: dict[tuple[int, str], Place] = {}
        self._count = count
        self._gpus = gpus
        self._running: dict[int, Place] = {}
        self._restarting: set[asyncio.TimerHandle] = set()
        self._closing = False
        self._gone: dict[LeafProcess, asyncio.Future[None]] = {}
        self._fingerprint: asyncio.Future[str] | None = None

    @property
    def pids(self) -> list[int]:
        """Process ids of the living leaf processes."""
        return [process.pid for process in self._gone if process.pid]

    @property
    def able(self) -> bool:
        """Whether leaf processes can be started. What becomes of them then is not asked: they run
        code of jobs, and a job that kills its processes is no reason to give the worker up."""
        if self._leaves.failed_starts >= LOST_STARTS_MAX:
            return False
        return any(place.lost_starts < LOST_STARTS_MAX for place in self._places.values())

    def start(self) -> None:
        """Start one process per slot; each says that its slot is idle once it is up."""
        for slot in range(self._count):
            self._place(slot, "")

    async def fingerprint(self) -> str:
        """Have a leaf process compute the numeric fingerprint of this machine.

        Raises FailedPrecondition where results are not reproducible on it at all.
        """
        self._fingerprint = asyncio.get_running_loop().create_future()
        self._tell(self._place(0, ""), Kind.FINGERPRINT)
        return await self._fingerprint

    async def set_up(self, job: PreparedJob) -> SetUpFailure | None:
        """Have a process of every slot load the job; return what failed in one of them.

        Each of its leaves tells it, too, unless the processes are made to forget the job.
        """
        places = [self._place(slot, job.code_key) for slot in range(self._count)]
        for place in places:
            self._introduce(place, job)
        waits = [
            place.setting_up[job.number].done for place in places if job.number in place.setting_up
        ]
        if waits:
            await asyncio.wait(waits, timeout=self._leaf_timeout_s)
        return next((each.result() for each in waits if each.done() and each.result()), None)

    def unlike(self, job: PreparedJob) -> str:
        """Say which slots have GPUs that give other bits than others; empty: none."""
        places = [each for each in self._places.values() if each.code == job.code_key]
        return unlike({each.slot: each.devices.get(job.number, "") for each in places})

    async def describe(self, job: PreparedJob) -> coordination.JobDescribed:
        """Have a leaf process describe a job; its silence is a failure of the job, and so is its
        death where the next one dies, too: the first may have been killed for another's sake."""
        for _ in range(DESCRIBE_ATTEMPTS):
            try:
                answer = await self._described(job)
            except _Died as error:
                text = f"a leaf process died while it built the model: {error}"
                answer = _not_described(text)
            else:
                break
        answer.job_id = job.plan.job_id
        return answer

    async def _described(self, job: PreparedJob) -> coordination.JobDescribed:
        place = self._place(0, job.code_key)
        while place.describing is not None:
            await asyncio.wait([place.describing])
        place.describing = asyncio.get_running_loop().create_future()
        # Kept: a process that is about to start is told when it is there.
        place.description = job.describe_body()
        place.described_job = job
        self._tell(place, Kind.DESCRIBE, place.description)
        try:
            await self._patiently(place, place.describing)
            found = coordination.JobDescribed.FromString(place.describing.result())
            check_description(found)
            return found
        except InvalidArgument as error:
            return _not_described(error.message, error.reason)
        except TimeoutError:
            if place.process is not None:
                place.process.hung()
            return _not_described(
                f"the job's code was not ready within {self._leaf_timeout_s:g} s and was killed"
            )
        finally:
            place.describing.cancel()  # whoever waits for its turn has it now
            place.describing, place.description = None, b""

    def run(self, task: Task, job: PreparedJob) -> None:
        """Run a task on its slot, which must be idle."""
        place = self._place(task.slot, job.code_key)
        place.task, place.job = task, job
        self._running[task.slot] = place
        if place.process is not None:
            self._order(place, task, job)

    def _order(self, place: Place, task: Task, job: PreparedJob) -> None:
        self._introduce(place, job)
        for part in task.parts:
            if part.buffer >= 0:
                job.arena.reserve(part.buffer)
            for buffer in part.next_state:
                job.arena.reserve(buffer)
        order = ipc.RunOrder(
            task=task.id,
            job=job.number,
            action=task.round.go.action,
            version=task.round.step,
            parameters=task.parameters,
            parts=tuple((part.node.first, part.node.span, part.buffer) for part in task.parts),
            absent=tuple(task.absent),
            states=tuple(_states_of(part) for part in task.parts if part.next_state),
            inputs=task.inputs,
        )
        self._tell(place, Kind.RUN, order.pack())

    def cancel(self, task: Task) -> None:
        """Have a running task stop after its present leaf; one without a process ends at once."""
        place = self._running.get(task.slot)
        if place is None or place.task is not task:
            return
        if place.process is not None:
            place.process.page.cancel(task.id)
            return
        self._leave(place)
        self._events.task_ended(task, lost=False)

    def end(self, task: Task) -> None:
        """Kill the process that still runs a task that was cancelled; its slot gets another."""
        place = self._running.get(task.slot)
        if place is not None and place.task is task and place.process is not None:
            place.process.kill()

    def fetched(self, process: LeafProcess, body: bytes) -> None:
        """Answer a leaf process that waits for a chunk."""
        place = self._place_of(process)
        if place is not None:
            place.fetching -= 1
            process.send(Kind.FETCHED, body)

    def drop(self, job: PreparedJob, code_in_use: bool) -> None:
        """Have the processes forget a job; those of code that nobody uses any more are ended."""
        for place in list(self._places.values()):
            process = place.process
            if place.code != job.code_key:
                continue
            place.devices.pop(job.number, None)
            if job.code_key and not code_in_use and place.describing is None:
                self._remove(place)
            elif process is not None and job.number in process.known_jobs:
                process.known_jobs.discard(job.number)
                self._tell(place, Kind.DROP, ipc.pack_json({"job": job.number}))

    def check(self) -> None:
        """Kill what hangs; call it every `TICK_S`."""
        now_s = time.monotonic()
        for slot, patience in enumerate(self._patience):
            place = self._running.get(slot)
            process = place.process if place is not None else None
            progress, limit_s = None, 0.0
            if place is not None and process is not None and not place.fetching:
                assert place.task is not None
                page = process.page
                limit_s = place.job.timeout_s if place.job is not None else 0.0
                progress = place.task.id, page.task, page.leaves, page.shard, process.pid
            if patience.exhausted(progress, now_s, limit_s) and process is not None:
                ids = place.ids() if place is not None else {}
                _log.warning("leaf_hung", slot=slot, shard=process.page.shard, **ids)
                process.hung()

    async def close(self) -> None:
        """End all processes and wait until they are gone."""
        self._closing = True
        for handle in self._restarting:
            handle.cancel()
        for process in self._gone:
            process.kill()
        if self._gone:
            await asyncio.wait(list(self._gone.values()), timeout=5.0)
        self._leaves.forget()

    # Inside

    def _place(self, slot: int, code: str) -> Place:
        place = self._places.get((slot, code))
        if place is None:
            spare = self._take_spare(slot)
            place = self._places[slot, code] = Place(slot, code, spare)
            if spare is None:
                self._start(place)
        return place

    def _take_spare(self, slot: int) -> LeafProcess | None:
        """A process of the slot that has not heard of any job yet: a start less to wait for."""
        place = self._places.get((slot, ""))
        if place is None or place.process is None or place.process.known_jobs:
            return None
        asked = slot == 0 and self._fingerprint is not None and not self._fingerprint.done()
        if asked or place.task is not None or place.describing is not None:
            return None
        del self._places[slot, ""]
        return place.process

    def _place_of(self, process: LeafProcess) -> Place | None:
        return next((each for each in self._places.values() if each.process is process), None)

    def _start(self, place: Place) -> None:
        if self._closing or self._places.get((place.slot, place.code)) is not place:
            return
        if not self._leaves.ready:
            self._leaves.call_when_ready(lambda: self._start(place))
            return
        try:
            process = LeafProcess(
                self._leaves,
                self._memory_limit_bytes,
                self._on_message,
                self._events.printed,
                self._on_exit,
                gpus_of_slot(self._gpus, place.slot, self._count),
            )
        except OSError as error:
            # No memory or no process to be had, most likely for a moment.
            _log.error("leaf_process_not_started", slot=place.slot, message=str(error))
            place.lost_starts += 1
            self._start_again(place)
            return
        place.process = process
        self._gone[process] = asyncio.get_running_loop().create_future()
        if place.task is not None and place.job is not None:
            self._order(place, place.task, place.job)
        if self._fingerprint is not None and not self._fingerprint.done() and place.slot == 0:
            self._tell(place, Kind.FINGERPRINT)
        if place.describing is not None and not place.describing.done():
            self._tell(place, Kind.DESCRIBE, place.description)

    def _start_again(self, place: Place) -> None:
        """Start the process of a place once more, at once the first time and later each time."""
        wait_s = place.restarts.wait_after_death(time.monotonic())
        if not wait_s:
            self._start(place)
            return

        def start() -> None:
            self._restarting.discard(handle)
            self._start(place)

        handle = asyncio.get_running_loop().call_later(wait_s, start)
        self._restarting.add(handle)

    def _remove(self, place: Place) -> None:
        """End the process of a place for good; its slot is free for others."""
        del self._places[place.slot, place.code]
        if place.process is not None:
            place.process.kill()
        task = place.task
        if task is not None:
            self._leave(place)
            self._events.task_ended(task, lost=True)
        if not self._closing and all(slot != place.slot for slot, _ in self._places):
            self._place(place.slot, "")
        if place.slot not in self._running:
            self._events.slot_idle(place.slot)

    async def _patiently(self, place: Place, answer: asyncio.Future[bytes]) -> None:
        """Wait for an answer; time in which the process waits for data, or is not there since the
        ones before it died, does not count."""
        spent_s = 0.0
        while not answer.done():
            await asyncio.wait([answer], timeout=TICK_S)
            # A task that runs before it has a limit of its own.
            idle = place.process is None or place.fetching or place.task is not None
            spent_s += 0.0 if idle else TICK_S
            if spent_s > self._leaf_timeout_s:
                raise TimeoutError

    def _introduce(self, place: Place, job: PreparedJob) -> None:
        process = place.process
        if process is not None and job.number not in process.known_jobs:
            process.known_jobs.add(job.number)
            done = asyncio.get_running_loop().create_future()
            place.setting_up[job.number] = SettingUp(job.plan.job_id, done)
            self._tell(place, Kind.SETUP, job.setup_body(), (job.arena.fd,))

    def _tell(self, place: Place, kind: Kind, body: bytes = b"", fds: tuple[int, ...] = ()) -> None:
        if place.process is not None:
            place.process.send(kind, body, fds)

    def _on_message(self, process: LeafProcess, message: Message) -> None:
        place = self._place_of(process)
        if place is None:
            return
        task = place.task
        match message.kind:
            case Kind.PART_DONE:
                done = ipc.PartDone.unpack(message.body)
                if task is not None and done.task == task.id:
                    self._events.part_done(task, done)
            case Kind.CALL_DONE:
                number, index, seconds, returned = ipc.unpack_call(message.body)
                if task is not None and number == task.id:
                    self._events.call_done(task, index, seconds, returned)
            case Kind.TASK_ENDED:
                if task is not None and ipc.unpack_ended(message.body) == task.id:
                    self._leave(place)
                    self._events.task_ended(task, lost=False)
            case Kind.PART_FAILED:
                document, _ = ipc.unpack_json(message.body)
                if task is not None and document["task"] == task.id:
                    self._events.part_failed(task, document["index"], _failure(document))
            case Kind.FETCH:
                place.fetching += 1
                self._events.fetch(process, task, ipc.unpack_json(message.body)[0])
            case Kind.PREFETCH:
                self._events.prefetch(ipc.unpack_json(message.body)[0])
            case Kind.READY:
                process.ready = True
                place.lost_starts = 0
                if place.slot not in self._running:
                    self._events.slot_idle(place.slot)
            case Kind.SETUP_DONE:
                self._has_set_up(place, ipc.unpack_json(message.body)[0])
            case Kind.DESCRIBED:
                document, answer = ipc.unpack_json(message.body)
                # One that was given up may still answer.
                asked = place.described_job
                wanted = asked is not None and document["job"] == asked.number
                if wanted and place.describing is not None and not place.describing.done():
                    place.describing.set_result(answer)
            case Kind.FINGERPRINTED:
                self._has_fingerprint(ipc.unpack_json(message.body)[0])

    def _has_fingerprint(self, document: dict[str, object]) -> None:
        if self._fingerprint is None or self._fingerprint.done():
            return
        if document["error"]:
            error = FailedPrecondition(str(document["error"]), reason="NO_FINGERPRINT")
            self._fingerprint.set_exception(error)
        else:
            self._fingerprint.set_result(str(document["fingerprint"]))

    def _has_set_up(self, place: Place, document: dict[str, object]) -> None:
        asked = place.setting_up.pop(int(str(document["job"])), None)
        if asked is None:
            return
        place.devices[int(str(document["job"]))] = str(document["device"])
        error, traceback = str(document["error"]), str(document["traceback"])
        if error:
            _log.warning("job_set_up_failed", slot=place.slot, job_id=asked.job_id, message=error)
        asked.done.set_result(SetUpFailure(error, traceback) if error else None)

    def _leave(self, place: Place) -> None:
        place.task = place.job = None
        if self._running.get(place.slot) is place:
            del self._running[place.slot]

    def _on_exit(self, process: LeafProcess, code: int) -> None:
        gone = self._gone.pop(process)
        gone.set_result(None)
        self._events.process_gone(process)
        place = self._place_of(process)
        if place is not None and not self._closing:
            self._died(place, process, code)

    def _died(self, place: Place, process: LeafProcess, code: int) -> None:
        how = describe_exit(code)
        shard = process.page.shard
        _log.warning("leaf_process_died", slot=place.slot, how=how, shard=shard, **place.ids())
        place.process = None
        place.fetching = 0
        place.lost_starts += not process.ready
        for asked in place.setting_up.values():
            asked.done.set_result(None)
        place.setting_up.clear()
        task, job = place.task, place.job
        # What a process is told it does in turn: while a task ran no model was being built.
        guiltless = task is not None and process.page.task == task.id
        # Of one that hung the model that was to blame has been given up before.
        guiltless = guiltless or process.orphaned or process.killed_as_hung
        if place.describing is not None and not place.describing.done() and not guiltless:
            place.describing.set_exception(_Died(how))
        if task is not None:
            self._leave(place)
            task.unheard = process.orphaned and process.page.task != task.id
            self._blame(task, job, process, code)
            self._events.task_ended(task, lost=True)
        self._start_again(place)

    def _blame(self, task: Task, job: PreparedJob | None, process: LeafProcess, code: int) -> None:
        """Name the shard whose leaf was running when the process ended."""
        shard = process.page.shard
        if process.page.task != task.id or shard < 0:
            return
        if process.orphaned and not self._events.server_died(task, shard):
            return
        for index, part in enumerate(task.parts):
            inside = part.node.first <= shard < part.node.first + part.node.span
            if inside and part.state is PartState.RUNNING and job is not None:
                kind, message = self._cause(process, code, job.timeout_s)
                rows = rows_of_shard(job.plan, shard, task.round.is_evaluation)
                seconds = process.page.leaf_seconds(time.monotonic_ns())
                failure = LeafFailure(shard, kind, message, "", *rows, seconds)
                self._events.part_failed(task, index, failure)

    def _cause(
        self, process: LeafProcess, code: int, timeout_s: float
    ) -> tuple[coordination.LeafFailed.Kind.ValueType, str]:
        if process.orphaned:
            text = "each time it runs, the process that starts leaf processes dies; leave it alone"
            return LeafFailed.KIND_CRASHED, text
        if process.killed_as_hung and timeout_s:
            text = f"the call had no end after {timeout_s:g} s and was killed; see tasks.timeout"
            return LeafFailed.KIND_HUNG, text
        if process.killed_as_hung:
            limit = f"{self._leaf_timeout_s:g} s"
            text = f"the leaf made no progress for {limit} and was killed; see --leaf-timeout-s"
            return LeafFailed.KIND_HUNG, text
        if process.was_out_of_memory(code):
            return LeafFailed.KIND_OUT_OF_MEMORY, "the kernel killed the leaf process for memory"
        return LeafFailed.KIND_CRASHED, f"the leaf process died: {describe_exit(code)}"


class _Died(Exception):
    """A leaf process ended while something waited for it."""


def _failure(document: dict[str, object]) -> LeafFailure:
    rows = document["rows"]
    assert isinstance(rows, list)
    kind = document["kind"]
    assert isinstance(kind, int)
    return LeafFailure(
        shard=int(str(document["shard"])),
        kind=LeafFailed.Kind.ValueType(kind),
        message=str(document["message"]),
        traceback=str(document["traceback"]),
        first_row=rows[0],
        row_count=rows[1],
        seconds=float(str(document["seconds"])),
        reason=str(document["reason"]),
    )


def _not_described(message: str, code: str = "JOB_CODE") -> coordination.JobDescribed:
    answer = coordination.JobDescribed()
    answer.failure.code = code
    answer.failure.message = message
    return answer


def _states_of(part: Part) -> tuple[int, ...]:
    """Buffers of the state to read, -1 for zero, and of the one to write."""
    return (*(part.read_state or (-1,) * len(part.next_state)), *part.next_state)
