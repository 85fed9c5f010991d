"""An aggregator process: its session with control, the jobs whose ranges it owns, its server."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from collections.abc import Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil

from coordinator.aggregation.checkpoints import PATIENCE, may_be_stored_later, read_part
from coordinator.aggregation.config import AggregatorConfig
from coordinator.aggregation.core.effects import Effect
from coordinator.aggregation.core.machine import JobRanges, stale_term
from coordinator.aggregation.core.making import make_ranges
from coordinator.aggregation.core.state import Array
from coordinator.aggregation.exchange import SERVICE, ExchangeServicer
from coordinator.aggregation.gauges import JobGauges
from coordinator.aggregation.hosting import HostedJob
from coordinator.aggregation.task_servicer import SERVICE as TASK_SERVICE
from coordinator.aggregation.task_servicer import TaskServicer
from coordinator.aggregation.tasks import HostedTasks
from phalanx import numeric_fingerprint
from phalanx.clients.storage import StorageClient
from phalanx.errors import Internal, PhalanxError, ResourceExhausted
from phalanx.ids import new_incarnation
from phalanx.rpc.credentials import ClientKeys, ServerKeys
from phalanx.rpc.limits import ServerLimits
from phalanx.rpc.member_session import MemberSession, Refused
from phalanx.rpc.own_address import own_address
from phalanx.rpc.patience import insist
from phalanx.rpc.process import announce
from phalanx.rpc.server import Server
from phalanx.rpc.storage_place import StoragePlace
from phalanx.tasks import runs_tasks
from phalanx.telemetry.logs import get_logger
from phalanx.telemetry.metrics import AggregatorMetrics, new_registry
from phalanx.v1 import coordination_service_pb2 as coordination
from phalanx.v1 import job_pb2, task_service_pb2_grpc
from phalanx.v1 import storage_service_pb2 as storage
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import ParameterRange

EXPIRE_EVERY_S = 30.0

_log = get_logger(__name__)

Command = coordination.JobCommand


async def serve(config: AggregatorConfig, stop: asyncio.Event) -> int:
    """Run until `stop` is set, or nobody tells where storage is; return the exit code."""
    server = Server(
        listen=config.listen,
        metrics_listen=config.metrics_listen,
        probe_listen=config.probe_listen,
        service_names=[SERVICE, TASK_SERVICE],
        reflection=config.reflection,
        registry=new_registry("aggregator", config.id),
        limits=ServerLimits.of(config),
        keys=ServerKeys.of(config),
    )
    aggregator = Aggregator(
        config, AggregatorMetrics(server.registry), numeric_fingerprint.compute()
    )
    ExchangeServicer(aggregator.find).add_to(server.raw)
    servicer = TaskServicer(aggregator.find_tasks)
    task_service_pb2_grpc.add_TaskServiceServicer_to_server(servicer, server.raw)
    await server.start()
    aggregator.start(config.advertise or await own_address(server.address, config.control, stop))
    server.set_serving(True)
    announce(
        config,
        role="aggregator",
        address=server.address,
        metrics_address=server.metrics_address,
    )
    missing = asyncio.create_task(aggregator.storage.missing.wait())
    asked = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((asked, missing), return_when=asyncio.FIRST_COMPLETED)
        return 0 if asked.done() else aggregator.storage.given_up("aggregator")
    finally:
        asked.cancel()
        missing.cancel()
        await aggregator.close()
        await server.stop()


class Aggregator:
    """Takes ranges as control assigns them, and lets them go."""

    def __init__(
        self, config: AggregatorConfig, metrics: AggregatorMetrics, fingerprint: str
    ) -> None:
        self._config = config
        self._keys = ClientKeys.of(config)
        self._fingerprint = fingerprint
        self._metrics = metrics
        self._id = config.id
        self._incarnation = new_incarnation()
        self._address = ""
        self._generation = 0
        self._jobs: dict[str, HostedJob | HostedTasks] = {}
        self._loading: dict[str, tuple[int, asyncio.Task[None]]] = {}
        self._background: set[asyncio.Task[Any]] = set()
        self.storage = StoragePlace(",".join(config.storage), self._keys)
        self._process = psutil.Process()
        self._session = MemberSession(
            config.control,
            self._hello,
            self._heartbeat,
            self._on_message,
            self._on_open,
            self._keys,
            self._let_all_go,
        )
        metrics.control_connected.set_function(lambda: float(self._session.connected))

    def find(self, job_id: str) -> HostedJob | None:
        """The job, if its ranges are loaded here."""
        job = self._jobs.get(job_id)
        return job if isinstance(job, HostedJob) else None

    def find_tasks(self, job_id: str) -> HostedTasks | None:
        """The job, if it is a set of tasks that are handed out here."""
        job = self._jobs.get(job_id)
        return job if isinstance(job, HostedTasks) else None

    def start(self, address: str) -> None:
        """Look for control; `address` is where workers reach this process."""
        self._address = address
        self._session.start()
        self._spawn(self._expire_series())

    async def close(self) -> None:
        """Let everything go."""
        await self._session.close()
        tasks = [task for _, task in self._loading.values()] + list(self._background)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(job.close() for job in self._jobs.values()))
        await self.storage.close()

    # -- the session with control

    def _hello(self) -> coordination.SessionRequest:
        held = [
            coordination.HeldRanges(
                job_id=job_id,
                term=job.ranges.term,
                range_indexes=job.ranges.range_indexes,
                version=max(0, job.ranges.version),
            )
            for job_id, job in self._jobs.items()
        ]
        return coordination.SessionRequest(
            aggregator_hello=coordination.AggregatorHello(
                aggregator_id=self._id,
                incarnation=self._incarnation,
                address=self._address,
                pid=os.getpid(),
                host=socket.gethostname(),
                held_ranges=held,
                generation=self._generation,
                version=_version(),
                fingerprint=self._fingerprint,
                history=self._session.history,
            )
        )

    def _heartbeat(self) -> coordination.Heartbeat:
        return coordination.Heartbeat(resident_bytes=self._process.memory_info().rss)

    def _on_open(self, welcome: coordination.Welcome) -> None:
        self.storage.welcomed(welcome, self._session.address)
        for job in self._jobs.values():
            self._say_ready(job)
            job.session_opened()

    def _on_message(self, message: coordination.SessionResponse) -> None:
        if message.generation < self._generation:
            raise Refused(
                f"control has generation {message.generation}, "
                f"generation {self._generation} was seen before"
            )
        self._generation = message.generation
        match message.WhichOneof("message"):
            case "assign_ranges":
                self._assign(message.assign_ranges)
            case "release_ranges":
                self._release(message.release_ranges)
            case "job_command":
                self._command(message.job_command)

    # -- ranges

    def _assign(self, message: coordination.AssignRanges) -> None:
        """Load ranges; a repeated assignment only says again that they are loaded."""
        job_id = message.plan.job_id
        job = self._jobs.get(job_id)
        if job is not None and job.ranges.term >= message.term:
            if job.ranges.term == message.term:
                self._say_ready(job)
            return
        loading = self._loading.get(job_id)
        if loading is not None:
            if loading[0] >= message.term:
                return
            loading[1].cancel()
        task = asyncio.create_task(self._load(message))
        self._loading[job_id] = (message.term, task)
        task.add_done_callback(lambda done: self._loaded(job_id, done))

    def _loaded(self, job_id: str, task: asyncio.Task[None]) -> None:
        if self._loading.get(job_id, (0, None))[1] is task:
            del self._loading[job_id]

    async def _load(self, message: coordination.AssignRanges) -> None:
        """Take the ranges, or tell control why not: a job must never wait for silence."""
        job_id = message.plan.job_id
        try:
            await self._take(message)
        except PhalanxError as error:
            failure = error
        except MemoryError as error:
            failure = ResourceExhausted(
                f"{self._id} has not enough memory for these ranges ({error}); "
                "use more aggregators, or a smaller model",
                reason="AGGREGATOR_MEMORY",
            )
        except Exception as error:  # noqa: BLE001 - whatever it is, control must hear of it
            _log.exception("ranges_not_loaded", job_id=job_id)
            failure = Internal(f"{type(error).__name__}: {error}")
        else:
            return
        job = self._jobs.get(job_id)
        if job is not None and job.ranges.term == message.term:
            del self._jobs[job_id]
            await job.close()
        self._say_not_ready(message, failure)

    async def _take(self, message: coordination.AssignRanges) -> None:
        job_id = message.plan.job_id
        old = self._jobs.pop(job_id, None)
        if old is not None:
            await old.close(stale_term(job_id, old.ranges.term, message.term))
        storage = await self._known_storage()
        if runs_tasks(JobSpec.FromString(message.plan.spec)):
            tasks = await HostedTasks.open(
                message.plan,
                message.term,
                storage,
                self._metrics,
                self._session.report,
                lambda: self._session.connected,
                message.seal_key,
            )
            self._jobs[job_id] = tasks
            tasks.begin()
            self._say_ready(tasks)
            return
        # Vectors of gigabytes are laid out and copied: in a thread, which alone knows them yet.
        ranges = await asyncio.to_thread(self._made, message)
        effects = await self._begin(message, ranges)
        gauges = JobGauges(self._metrics, job_id, message.plan)
        job = HostedJob(
            ranges,
            storage,
            gauges,
            self._session.report,
            connected=lambda: self._session.connected,
            settled=lambda: self._session.settled,
            seal_key=message.seal_key,
        )
        self._jobs[job_id] = job
        # The newest step that is known to have been there: what comes after the checkpoint is
        # computed again.
        reached = max(message.reached_step, old.ranges.version if old is not None else 0)
        job.restored(message.restore.step, max(0, reached - message.restore.step))
        job.perform(effects)
        _log.info("ranges_loaded", job_id=job_id, term=message.term, version=ranges.version)
        self._say_ready(job)

    def _made(self, message: coordination.AssignRanges) -> JobRanges:
        owned = [piece for piece in message.ranges if piece.aggregator_id == self._id]
        return make_ranges(
            message.plan,
            message.term,
            owned,
            secret=secrets.randbits(128),
            noise_secret=message.secret,
            seal_key=message.seal_key,
        )

    async def _begin(self, message: coordination.AssignRanges, ranges: JobRanges) -> list[Effect]:
        """Load the checkpoint, if there is one, and begin; waits as long as storage is away."""
        if not message.HasField("restore"):
            return ranges.begin()
        manifest = message.restore
        pieces = {piece.index: piece for piece in message.ranges}
        vectors = {
            index: await self._read(manifest, pieces[index]) for index in ranges.range_indexes
        }
        return await asyncio.to_thread(
            ranges.begin_restored, manifest.step, vectors, manifest.root_state
        )

    async def _read(
        self, manifest: storage.CheckpointManifest, piece: ParameterRange
    ) -> tuple[Array, Mapping[str, Array]]:
        def say(error: PhalanxError, _number: int) -> None:
            _log.warning("checkpoint_not_reachable", message=error.message)

        attempt = partial(read_part, await self._known_storage(), manifest, piece)
        return await insist(attempt, PATIENCE, passes=may_be_stored_later, on_failure=say)

    async def _known_storage(self) -> StorageClient:
        return await self.storage.client()

    def _say_ready(self, job: HostedJob | HostedTasks) -> None:
        self._session.report(
            coordination.SessionRequest(
                ranges_ready=coordination.RangesReady(
                    job_id=job.ranges.plan.job_id,
                    term=job.ranges.term,
                    version=max(0, job.ranges.version),
                )
            )
        )

    def _say_not_ready(self, message: coordination.AssignRanges, error: PhalanxError) -> None:
        _log.error("ranges_refused", job_id=message.plan.job_id, message=error.message)
        self._session.report(
            coordination.SessionRequest(
                ranges_ready=coordination.RangesReady(
                    job_id=message.plan.job_id,
                    term=message.term,
                    failure=job_pb2.Failure(code=error.reason, message=error.message),
                )
            )
        )

    def _release(self, message: coordination.ReleaseRanges) -> None:
        loading = self._loading.get(message.job_id)
        if loading is not None and loading[0] <= message.term:
            loading[1].cancel()
        job = self._jobs.get(message.job_id)
        if job is not None and job.ranges.term <= message.term:
            del self._jobs[message.job_id]
            self._spawn(job.close())

    def _let_all_go(self) -> None:
        """Storage knows nothing of what is held here: it is of another history."""
        held = {job_id: job.ranges.term for job_id, job in self._jobs.items()}
        held |= {job_id: term for job_id, (term, _) in self._loading.items()}
        for job_id, term in held.items():
            self._release(coordination.ReleaseRanges(job_id=job_id, term=term))

    def _command(self, command: Command) -> None:
        job = self._jobs.get(command.job_id)
        if job is None or job.ranges.term != command.term:
            return
        if command.kind == Command.KIND_PAUSE:
            job.pause()
        elif command.kind == Command.KIND_FAIL:
            job.fail(command.reason, command.message)

    # -- housekeeping

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.create_task(coroutine)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _expire_series(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(EXPIRE_EVERY_S)
            self._metrics.per_job.expire(loop.time())


def _version() -> str:
    try:
        return version("phalanx")
    except PackageNotFoundError:
        return ""
