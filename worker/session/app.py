"""The session process: brings decisions, leaf processes, streams and cache together.

Everything runs in one event loop and nothing here computes. Each thing that happens is told to the
core, whose effects are performed at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from phalanx.errors import Internal
from phalanx.ids import new_incarnation
from phalanx.rpc.credentials import ClientKeys
from phalanx.rpc.member_session import MemberSession, Refused
from phalanx.telemetry.logs import get_logger
from phalanx.telemetry.metrics import WorkerMetrics
from phalanx.v1 import coordination_service_pb2 as coordination
from phalanx.v1 import training_pb2
from worker import ipc
from worker.cache import BlobCache, Download
from worker.code import remove_all_unused
from worker.config import WorkerConfig
from worker.core import effects as do
from worker.core.all_reduce.job import AllReduceJob
from worker.core.calls import TaskSetCore
from worker.core.dispatch import Task
from worker.core.job import JobCore
from worker.core.progress import EndedAttempts
from worker.core.rounds import LeafFailure
from worker.core.session import WorkerCore
from worker.ipc import Returned
from worker.session.all_reduce.hosting import GetStorage, HostedAllReduce
from worker.session.chunks import ChunkServer
from worker.session.devices import gpu_kinds, gpus_here, libraries_here
from worker.session.fingerprint import stored_fingerprint
from worker.session.hosting import HostedJob
from worker.session.leaf_server import LeafServer
from worker.session.leaf_spans import LeafSpans
from worker.session.logs import LogCollector
from worker.session.process import LeafProcess
from worker.session.setup import PreparedJob, prepare
from worker.session.slots import TICK_S, SlotPool
from worker.session.tasks import HostedTasks, Store
from worker.session.unprepared import not_prepared, not_set_up, text_of

GoRecord = training_pb2.GoRecord
LeafFailed = coordination.LeafFailed

_LOG_FLUSH_S = 0.25
_PREPARE_RETRY_S = 2.0
_PREPARE_RETRY_LONGEST_S = 30.0
_KILL_AFTER_S = 1.0
"""What a call that nobody wants any more has to end by itself; a leaf always gets to its end."""
_LEAVE_WITHOUT_CONTROL_S = 1.0
_LAST_WORDS_S = 5.0
"""How long control may take to hear the last of them."""
_JOB_WAIT_S = 0.05
"""How long idle slots wait for a job that is behind: some round trips."""

_log = get_logger(__name__)


class Session:
    """One worker. `download` gets blobs from storage and `store` puts one there; `welcomed` learns
    of each welcome, and of the address of who sent it, where that is; `leaves` starts its leaf
    processes. `storage` is needed where `address` is set: for jobs whose workers own the
    parameters. `keys` are what it proves itself with."""

    def __init__(
        self,
        config: WorkerConfig,
        metrics: WorkerMetrics,
        download: Download,
        welcomed: Callable[[coordination.Welcome, str], None],
        leaves: LeafServer | None = None,
        store: Store | None = None,
        storage: GetStorage | None = None,
        keys: ClientKeys | None = None,
    ) -> None:
        self._config = config
        self._keys = keys
        self._storage = storage
        #: Where other workers reach this one; empty: nowhere.
        self.address = ""
        #: Called when the worker cannot work any more, and when it can again.
        self.able_changed: Callable[[bool], None] = lambda _: None
        self.able = True
        self._metrics = metrics
        self._welcomed = welcomed
        self._store = store or _no_store
        self._leaf_done = metrics.leaf_seconds.labels(program="train", outcome="done")
        self._spans = LeafSpans(config.id)
        self._call_done = metrics.leaf_seconds.labels(program="tasks", outcome="done")
        metrics.control_connected.set_function(lambda: float(self.connected))
        self._incarnation = new_incarnation()
        self._core = WorkerCore(config.slot_count, config.id)
        self._cache = BlobCache(config.cache_dir, config.cache_bytes, download, metrics)
        self._gpus = gpus_here(config.gpus, os.environ)
        self._gpu_kinds = gpu_kinds(self._gpus)
        self._slots = SlotPool(
            config.slot_count,
            config.slot_memory_bytes,
            config.leaf_timeout_s,
            self,
            leaves,
            self._gpus,
        )
        self._chunks = ChunkServer(self._cache, self._slots.fetched)
        self._control = MemberSession(
            config.control,
            self._hello,
            self._heartbeat,
            self._on_message,
            self._on_open,
            keys,
            lambda: self._perform(self._core.let_all_go()),
        )
        self._logs = LogCollector(config.id, self._control.report)
        self._jobs: dict[str, HostedJob | HostedTasks] = {}
        self._attempts = EndedAttempts()
        self._background: set[asyncio.Task[None]] = set()
        self._described: PreparedJob | None = None
        self._fingerprint = ""
        self._drained = asyncio.Event()
        self._job_wait: asyncio.TimerHandle | None = None

    @property
    def connected(self) -> bool:
        """Whether there is a session with control."""
        return self._control.connected

    @property
    def leaf_pids(self) -> list[int]:
        """Process ids of the leaf processes."""
        return self._slots.pids

    async def start(self) -> None:
        """Start the leaf processes, find out the fingerprint, begin to connect."""
        await asyncio.to_thread(remove_all_unused, self._code_root)
        self._slots.start()
        self._fingerprint = await stored_fingerprint(
            self._config.cache_dir, self._slots.fingerprint
        )
        self._control.start()
        self._spawn(self._every(TICK_S, self._check))
        self._spawn(self._every(_LOG_FLUSH_S, self._logs.flush))

    def _check(self) -> None:
        """Kill what hangs; tell whether this worker can work at all.

        A session with control is not asked for: who waits for control to come back works on, and
        a fresh worker would only wait instead, without what this one holds.
        """
        self._slots.check()
        able = self._slots.able and self._cache.writable
        if able != self.able:
            self.able = able
            tell = _log.info if able else _log.error
            tell(
                "able_again" if able else "not_able_to_work",
                leaf_processes=self._slots.able,
                cache_writable=self._cache.writable,
            )
            self.able_changed(able)

    async def leave(self) -> None:
        """Leave in good order: have the work moved away, then let go; bounded in time."""
        self._perform(self._core.drain())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.drain_timeout_s):
                while not self._drained.is_set():
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(_LEAVE_WITHOUT_CONTROL_S):
                            await self._drained.wait()
                    if not self._control.connected:
                        _log.info("left_without_control")
                        break
        self._logs.flush()
        await self._control.leave(_LAST_WORDS_S)

    async def wait_drained(self) -> None:
        """Return once control has drained this worker."""
        await self._drained.wait()

    async def close(self) -> None:
        """End streams, leaf processes and downloads."""
        if self._job_wait is not None:
            self._job_wait.cancel()
        await self._control.close()
        for task in list(self._background):
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await asyncio.gather(*(job.close() for job in self._jobs.values()))
        await self._chunks.close()
        await self._slots.close()
        await self._cache.close()
        for job in self._jobs.values():
            if job.prepared is not None:
                job.prepared.release()

    # Control

    def _hello(self) -> coordination.SessionRequest:
        hello = coordination.WorkerHello(
            worker_id=self._config.id,
            incarnation=self._incarnation,
            fingerprint=self._fingerprint,
            slots=self._config.slot_count,
            pid=os.getpid(),
            host=socket.gethostname(),
            labels=self._config.label_map,
            memory_bytes=_memory_bytes(),
            slot_memory_bytes=self._config.slot_memory_bytes,
            held_jobs=self._core.held_jobs(),
            generation=self._core.generation,
            version=_version(),
            address=self.address,
            history=self._control.history,
            libraries=libraries_here(),
            gpus=len(self._gpus),
            gpu_kinds=self._gpu_kinds,
        )
        return coordination.SessionRequest(worker_hello=hello)

    def _heartbeat(self) -> coordination.Heartbeat:
        now_s = time.monotonic()
        jobs = [
            coordination.WorkerJobProgress(
                job_id=job.core.job_id,
                term=job.core.term,
                step=job.step,
                leaves_done=job.progress.leaves_done,
                examples_per_second=job.progress.examples_per_second(now_s),
                leaf_seconds_p95=job.progress.leaf_seconds_p95,
                train_leaves=job.progress.train_leaves,
                train_leaf_seconds=job.progress.train_leaf_seconds,
            )
            for job in self._jobs.values()
        ]
        return coordination.Heartbeat(
            jobs=jobs,
            resident_bytes=_resident_bytes([os.getpid(), *self._slots.pids]),
            ended_attempts=self._attempts.messages(),
        )

    def _on_open(self, welcome: coordination.Welcome) -> None:
        self._welcomed(welcome, self._control.address)
        if self._core.draining:
            self._perform([self._core.drain_request()])
        for job in self._core.jobs.values():
            self._perform(job.open_failures())
        for hosted in self._jobs.values():
            if isinstance(hosted, HostedAllReduce):
                hosted.session_opened()

    def _on_message(self, message: coordination.SessionResponse) -> None:
        effects = self._core.message(message)
        for effect in effects:
            if isinstance(effect, do.RefuseSession):
                raise Refused(
                    f"control has generation {effect.generation}, "
                    f"generation {effect.highest} was seen before"
                )
        self._perform(effects)

    # What the core wants

    def _perform(self, effects: list[do.Effect]) -> None:
        for effect in effects:
            match effect:
                case do.Wake():
                    self._jobs[effect.job_id].wake(effect.aggregator_id)
                case do.Run():
                    self._run(effect.task)
                case do.WaitForJob():
                    loop = asyncio.get_running_loop()
                    self._job_wait = loop.call_later(_JOB_WAIT_S, self._wait_over, effect.number)
                case do.Cancel():
                    self._slots.cancel(effect.task)
                    self._chunks.cancel(effect.task)
                    if effect.task.is_call:
                        self._end_soon(effect.task)
                case do.Report():
                    self._report(effect.message)
                case do.Prepare():
                    self._prepare(effect)
                case do.OpenStreams():
                    self._jobs[effect.job_id].open_streams(effect)
                case do.Discard():
                    self._discard(effect.job_id)
                case do.Drained():
                    self._drained.set()
                case do.RefuseSession():
                    raise AssertionError("refusals are handled where messages arrive")
                case _:
                    job = self._jobs.get(effect.job_id)
                    if isinstance(job, HostedAllReduce):
                        job.carry_out(effect)

    def _wait_over(self, number: int) -> None:
        self._perform(self._core.wait_over(number))

    def _settle(self, effects: list[do.Effect]) -> None:
        self._perform(self._core.settle(effects))

    def _run(self, task: Task) -> None:
        prepared = self._jobs[task.job_id].prepared
        assert prepared is not None
        self._slots.run(task, prepared)

    def _report(self, message: coordination.SessionRequest) -> None:
        if message.HasField("leaf_failed"):
            failed = message.leaf_failed
            outcome = _outcome(failed.kind)
            _log.warning(
                "leaf_failed",
                job_id=failed.job_id,
                step=failed.step,
                shard=failed.shard,
                kind=outcome,
                message=failed.message,
            )
            job = self._jobs.get(failed.job_id)
            if job is not None and job.prepared is not None and failed.traceback:
                number, text = job.prepared.number, failed.traceback
                self._logs.add(number, failed.step, failed.shard, "error", text)
        self._control.report(message)

    def _prepare(self, effect: do.Prepare) -> None:
        if effect.describe:
            self._spawn(self._describe(effect.plan))
            return
        job_id = effect.plan.job_id
        core = self._core.jobs[job_id]
        job = self._jobs[job_id] = self._hosted(core)
        job.preparing = self._spawn(self._host(job))

    def _hosted(self, core: JobCore | TaskSetCore) -> HostedJob | HostedTasks:
        me = self._config.id, self._incarnation
        if isinstance(core, TaskSetCore):
            return HostedTasks(core, *me, self._settle, self._store, self._keys)
        if not isinstance(core, AllReduceJob):
            return HostedJob(core, *me, self._settle, self._keys)
        assert self._storage is not None
        return HostedAllReduce(
            core,
            *me,
            self._settle,
            self._keys,
            send=self._control.report,
            connected=lambda: self._control.connected,
            storage=self._storage,
            sent_bytes=self._metrics.member_bytes_total,
        )

    def served(self, job_id: str) -> HostedAllReduce | None:
        """The job whose members may open streams to this worker, if it is here."""
        job = self._jobs.get(job_id)
        return job if isinstance(job, HostedAllReduce) else None

    async def _host(self, job: HostedJob | HostedTasks) -> None:
        """Fetch what the job needs, however long storage is away, and set it up in all slots."""
        wait_s = _PREPARE_RETRY_S
        while not await self._set_up(job):
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 2, _PREPARE_RETRY_LONGEST_S)
        self._perform(self._core.prepare_done(job.core.job_id, await self._own_leaf(job)))

    async def _set_up(self, job: HostedJob | HostedTasks) -> bool:
        """Try once; what keeps the job from running here is told for each of its shards here.

        Again each time: control may have no other worker to give them to.
        """
        plan = job.core.plan
        try:
            if job.prepared is None:
                prepared = await prepare(plan, self._cache, self._code_root)
                job.became_prepared(prepared)
                self._logs.hosted(prepared.number, plan.job_id)
            assert job.prepared is not None
            failed = await self._slots.set_up(job.prepared)
        except Exception as error:  # noqa: BLE001 - control must hear of it, whatever it is
            _log.warning("job_not_prepared", job_id=plan.job_id, message=text_of(error))
            for report in not_prepared(job.core, error):
                self._report(report)
            return False
        if failed is not None and isinstance(job, HostedTasks):
            # Without shards there are no leaves to tell it; and its tasks are better run elsewhere.
            self._slots.drop(job.prepared, code_in_use=True)
            self._report(not_set_up(job.core, failed))
            return False
        return True

    async def _own_leaf(self, job: HostedJob | HostedTasks) -> str:
        """Return the hash of this worker's own leaf of a reproducible job, empty if it fails.

        Its failure is not told: the same leaf fails again as that of its shard. One slot computes
        it; where GPUs of slots differ the hash is none, so that the worker takes no part.
        """
        assert job.prepared is not None
        if not job.core.plan.bitwise or isinstance(job, HostedTasks):
            return ""
        if unlike := self._slots.unlike(job.prepared):
            return unlike
        described = await self._slots.describe(job.prepared)
        if not described.HasField("failure"):
            return described.leaf_sha256
        text = described.failure.message
        _log.warning("own_leaf_failed", job_id=job.core.job_id, message=text)
        return ""

    async def _describe(self, plan: training_pb2.JobPlan) -> None:
        prepared = None
        answer = coordination.JobDescribed(job_id=plan.job_id)
        try:
            prepared = await prepare(plan, self._cache, self._code_root)
            self._logs.hosted(prepared.number, plan.job_id)
            answer = await self._slots.describe(prepared)
            self._logs.add(prepared.number, -1, -1, "error", answer.failure.traceback)
        except Exception as error:  # noqa: BLE001 - control waits for an answer
            answer.failure.code = "JOB_DATA"
            answer.failure.message = text_of(error)
        finally:
            if prepared is not None:
                self._logs.released(prepared.number)
                self._end_described(prepared, keep=not answer.HasField("failure"))
                prepared.release()
        self._control.report(coordination.SessionRequest(job_described=answer))

    def _end_described(self, described: PreparedJob, *, keep: bool) -> None:
        """End the process of a description that nothing may follow.

        Most often the job comes at once and finds it warm, so the last one stays.
        """
        ended = [] if keep else [described]
        if keep and described.code_key:
            before, self._described = self._described, described
            if before is not None and before.code_key != described.code_key:
                ended.append(before)
        used = {job.prepared.code_key for job in self._jobs.values() if job.prepared}
        for each in ended:
            if each.code_key and each.code_key not in used:
                self._slots.drop(each, code_in_use=False)

    def _discard(self, job_id: str) -> None:
        job = self._jobs.pop(job_id)
        self._spawn(self._let_go(job))

    async def _let_go(self, job: HostedJob | HostedTasks) -> None:
        await job.close()
        prepared = job.prepared
        if prepared is not None:
            keys = {other.prepared.code_key for other in self._jobs.values() if other.prepared}
            self._slots.drop(prepared, prepared.code_key in keys)
            self._logs.released(prepared.number)
            prepared.release()

    @property
    def _code_root(self) -> Path:
        return self._config.cache_dir / "code"

    # What the slots say

    def slot_idle(self, slot: int) -> None:
        """A leaf process is up."""
        self._perform(self._core.slot_idle(slot))

    def part_done(self, task: Task, done: ipc.PartDone) -> None:
        """A part of a task is in its buffer."""
        for seconds in done.seconds:
            self._leaf_done.observe(seconds)
        self._attempts.ended(calls=False, count=len(done.seconds))
        self._core.computed(task.job_id, sum(done.seconds))
        trains = task.round.go.action == GoRecord.ACTION_TRAIN
        examples = done.count if trains else 0
        self._metrics.leaf_examples_total.inc(examples)
        job = self._jobs.get(task.job_id)
        if not isinstance(job, HostedJob) or not job.core.owns(task):
            return
        job.progress.add(examples, done.seconds, waited_s=done.waited_s, trains=trains)
        part = task.parts[done.index]
        self._spans.ended(task, part, sum(done.seconds), job.core.plan)
        self._settle(job.core.part_done(task, part, done.count, done.loss, done.mask, done.sums))

    def call_done(self, task: Task, index: int, seconds: float, returned: Returned) -> None:
        """A call of a set of tasks returned."""
        self._call_done.observe(seconds)
        self._attempts.ended(calls=True)
        self._core.computed(task.job_id, seconds)
        job = self._jobs.get(task.job_id)
        if isinstance(job, HostedTasks) and job.core.owns(task):
            job.call_done(task, index, seconds, returned)

    def part_failed(self, task: Task, index: int, failure: LeafFailure) -> None:
        """A leaf failed."""
        job = self._jobs.get(task.job_id)
        calls = isinstance(job, HostedTasks)
        self._attempts.ended(calls=calls, failed=failure.kind)
        program = "tasks" if calls else "train"
        outcome = _outcome(failure.kind)
        observe = self._metrics.leaf_seconds.labels(program=program, outcome=outcome).observe
        observe(failure.seconds)
        if job is not None and job.core.owns(task):
            if isinstance(job, HostedTasks) and job.prepared is not None:
                step, shard = -1, failure.shard
                self._logs.add(job.prepared.number, step, shard, "error", failure.traceback)
            elif isinstance(job, HostedJob):
                part, plan = task.parts[index], job.core.plan
                self._spans.ended(task, part, failure.seconds, plan, failed=outcome)
            self._settle(job.core.part_failed(task, task.parts[index], failure))

    def server_died(self, task: Task, shard: int) -> bool:
        """The leaf server died while a leaf of a task ran; whether that leaf is to blame."""
        return self._core.server_died(task, shard)

    def task_ended(self, task: Task, lost: bool) -> None:
        """A leaf process is through with a task, or died over it."""
        self._chunks.ended(task)
        self._perform(self._core.task_ended(task, lost))

    def fetch(self, process: LeafProcess, task: Task | None, document: dict[str, object]) -> None:
        """A leaf waits for a chunk."""
        self._chunks.fetch(process, task, document)

    def prefetch(self, document: dict[str, object]) -> None:
        """A leaf process names chunks that it will need."""
        self._chunks.prefetch(document)

    def printed(self, process: LeafProcess, level: str, data: bytes) -> None:
        """A leaf process printed something."""
        self._logs.printed(process, level, data)

    def process_gone(self, process: LeafProcess) -> None:
        """A leaf process has ended."""
        self._chunks.process_gone(process)
        self._logs.process_gone(process)

    # Helpers

    def _end_soon(self, task: Task) -> None:
        """Kill what still runs a call after a while: it may take as long as it likes."""
        loop = asyncio.get_running_loop()
        loop.call_later(_KILL_AFTER_S, self._slots.end, task)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if not task.cancelled() and task.exception() is not None:
            _log.error("background_task_failed", exc_info=task.exception())

    async def _every(self, interval_s: float, act: Callable[[], None]) -> None:
        while True:
            await asyncio.sleep(interval_s)
            try:
                act()
            except Exception:  # noqa: BLE001 - or hangs and log lines would go unseen from now on
                _log.exception("periodic_task_failed")


async def _no_store(_: memoryview) -> str:
    raise Internal("this worker has no storage to keep large values in")


def _outcome(kind: coordination.LeafFailed.Kind.ValueType) -> str:
    return LeafFailed.Kind.Name(kind).removeprefix("KIND_").lower()


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _resident_bytes(pids: list[int]) -> int:
    """Resident memory of these processes; shared pages count in each."""
    pages = 0
    for pid in pids:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/statm", "rb", buffering=0) as file:
            pages += int(file.read().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("phalanx")
    except PackageNotFoundError:
        return "unknown"
