"""A whole cluster in one world: the mains of the services that ship, on simulated machines."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import coordinator.aggregation.exchange
import coordinator.aggregation.process
import coordinator.control.model_writer
import coordinator.control.process
import coordinator.control.submission
import phalanx.clients.blob_transfers
import phalanx.compressors.base
import phalanx.frames
import phalanx.reducers.contributions
import phalanx.rpc.server
import storage.backends.opening
import storage.runtime
import storage.service.operations
import worker.main
import worker.session.app
import worker.session.setup
import worker.session.slots
from coordinator.aggregation.config import AggregatorConfig
from coordinator.control.config import ControlConfig
from coordinator.control.core import members, ownership
from phalanx.needs import TORCH
from phalanx.testing.simulation import Network, Process, World
from phalanx.testing.simulation.clocks import Environment, environment
from phalanx.testing.simulation.network import Link
from phalanx.testing.simulation.rpc import process_died
from storage.config import StorageConfig
from tests.simulation import jobs, versions, wishes
from tests.simulation.calls import CallingLeaf
from tests.simulation.hosts import Arena, Cache, Leaf, Machines
from tests.simulation.oracle import LEASE_TTL_S
from tests.simulation.stored import Machine
from tests.simulation.time_lines import clock_off_ns
from worker.config import WorkerConfig

STORAGE = "storage:7420"
BLOCK_ELEMENTS = 32
FRAME_BYTES = 2 * BLOCK_ELEMENTS * 4
RUNS_PER_COLLECTION = 8
GRACES = 2.0
"""Age of a blob that nothing names at which it is garbage, in times between two collections."""
_PORTS = {"control": 7410, "aggregator": 7430, "worker": 7440}


class _Nothing:
    """Takes every measurement and keeps none."""

    def __getattr__(self, name: str) -> _Nothing:
        setattr(self, name, self)  # found without this the next time
        return self

    def __call__(self, *_: Any, **__: Any) -> _Nothing:
        return self

    def __bool__(self) -> bool:
        return False


NOTHING = _Nothing()


class _Secrets:
    """What is secret is the same in each run."""

    def randbits(self, bits: int) -> int:
        return (1 << bits) // 3


class _Psutil:
    def Process(self) -> _Psutil:
        return self

    def memory_info(self) -> _Psutil:
        return self

    rss = 0


class _FileSink(phalanx.clients.blob_transfers.MemorySink):
    """A download into the cache of a simulated machine."""

    machines: Machines

    def __init__(self, path: Any) -> None:
        super().__init__()
        self._key = (path.parent.name, path.name)

    def publish(self) -> int:
        self.machines.files[self._key] = self.content()
        return self.size_bytes


class _LeafServer:
    """Leaf processes of simulated machines need nobody who starts them."""

    ready = True
    failed_starts = 0

    def forget(self) -> None:
        pass


class Services:
    """Replaces what the services would ask of the machine; one for as many runs as wanted."""

    def __init__(self, made: Environment) -> None:
        self.environment = made
        self.machines: Machines | None = None
        self.storage: Machine | None = None
        self._runs = 0
        for module in (
            coordinator.aggregation.process,
            coordinator.control.process,
            storage.runtime,
            worker.main,
        ):
            made.replace(module, "announce", lambda *_, **__: None)
        self._measure_nothing()
        self._replace_machine()
        made.replace(phalanx.frames, "BLOCK_ELEMENTS", BLOCK_ELEMENTS)
        blocks = (members, ownership, phalanx.compressors.base, phalanx.reducers.contributions)
        for module in blocks:
            made.replace(module, "BLOCK_ELEMENTS", BLOCK_ELEMENTS)
        made.replace(phalanx.frames.frame_grid, "__defaults__", (FRAME_BYTES,))

    def _measure_nothing(self) -> None:
        replace = self.environment.replace
        for module, names in (
            (coordinator.control.process, ("ControlMetrics", "new_registry", "Gauges")),
            (coordinator.aggregation.process, ("AggregatorMetrics", "JobGauges")),
            (phalanx.rpc.server, ("GrpcServerMetrics", "new_registry", "_add_reflection")),
            (storage.runtime, ("StorageMetrics", "new_registry")),
            (worker.main, ("WorkerMetrics", "new_registry")),
        ):
            for name in names:
                replace(module, name, NOTHING)

    def _replace_machine(self) -> None:
        replace = self.environment.replace
        replace(worker.main, "gc", NOTHING)
        replace(coordinator.aggregation.process, "psutil", _Psutil())
        replace(coordinator.aggregation.process, "secrets", _Secrets())
        replace(coordinator.aggregation.process, "numeric_fingerprint", self)
        replace(worker.session.app, "_resident_bytes", lambda _: 0)
        replace(worker.session.app, "_memory_bytes", lambda: 1 << 34)
        replace(worker.session.app, "_version", lambda: "simulated")
        replace(coordinator.aggregation.process, "_version", lambda: "simulated")
        replace(coordinator.control.model_writer, "_versions", dict)
        replace(coordinator.control.submission, "new_secret", lambda: jobs.SECRET)
        replace(worker.session.app, "stored_fingerprint", _fingerprint)
        replace(worker.session.app, "libraries_here", self._libraries)
        replace(worker.session.app, "gpu_kinds", lambda _: ())
        replace(worker.session.app, "BlobCache", self._cache)
        replace(worker.session.slots, "LeafServer", _LeafServer)
        replace(worker.session.slots, "LeafProcess", self._leaf)
        replace(worker.session.setup, "Arena", self)
        replace(phalanx.clients.blob_transfers, "FileSink", _FileSink)
        replace(storage.backends.opening, "open_embedded_backend", self._backend)
        self._replace_making()

    def _replace_making(self) -> None:
        """Some aggregators have not the memory for what they are to own."""
        made = coordinator.aggregation.process.Aggregator._made

        def makes(aggregator: Any, message: Any) -> Any:
            assert self.machines is not None
            name = self.machines.world.loop.current.name
            if name in self.machines.small:
                raise MemoryError(f"{name} is too small")
            return made(aggregator, message)

        self.environment.replace(coordinator.aggregation.process.Aggregator, "_made", makes)

    def collect_garbage(self) -> None:
        """Between runs only, see `loop`; seldom, since each time everything is walked through."""
        storage.service.operations._going_on.clear()  # of processes that are gone
        self._runs += 1
        if self._runs % RUNS_PER_COLLECTION == 0:
            gc.collect()

    def compute(self) -> str:
        """The numeric fingerprint of an aggregator."""
        assert self.machines is not None
        name = self.machines.world.loop.current.name
        return self.machines.fingerprints.get(name, jobs.FINGERPRINTS[0])

    def _libraries(self) -> dict[str, str]:
        assert self.machines is not None
        name, old = self.machines.world.loop.current.name, self.machines.old
        return {TORCH.package: versions.version_of(name, old)} if old else {}

    def create(self, name: str, element_count: int, dtype: Any) -> Arena:
        """The arena of a job."""
        assert self.machines is not None
        return Arena(self.machines, element_count, dtype)

    def _cache(self, folder: Any, limit_bytes: int, download: Any, metrics: Any) -> Cache:
        assert self.machines is not None
        return Cache(self.machines, download)

    def _leaf(
        self,
        _leaves: Any,
        _limit: int,
        on_message: Any,
        on_log: Any,
        on_exit: Any,
        _gpus: Any,
    ) -> Leaf:
        assert self.machines is not None
        return CallingLeaf(self.machines, on_message, on_log, on_exit)

    def _backend(self, folder: Any, **more: Any) -> Any:
        assert self.storage is not None
        return self.storage.backend(
            more["on_corruption"],
            more["on_failure"],
            coordinator.control.leader.time.time_ns,
            more["namespace_bytes_max"],
        )


async def _fingerprint(folder: Any, compute: Callable[[], Any]) -> Any:
    return await compute()


@contextmanager
def services() -> Iterator[Services]:
    """Everything replaced, for as long as the block runs."""
    collects = gc.isenabled()
    gc.collect()
    # What is loaded stays, for good: to walk through what a process of tests has loaded takes as
    # long as a run, and each block, like each collection after runs, would do it.
    gc.freeze()
    gc.disable()  # see `collect_garbage`
    try:
        with environment() as made:
            yield Services(made)
    finally:
        if collects:
            gc.enable()


class Cluster:
    """The processes of one run, by name; a name that is started again is a new incarnation."""

    def __init__(self, world: World, network: Network, given: Services, settings: Any) -> None:
        self.world = world
        self.network = network
        self.settings = settings
        self.chance = world.chance
        self.machines = Machines(world, self._leaf_s)
        self.storage_machine = Machine(world)
        self.alive: dict[str, Process] = {}
        self.stops: dict[str, asyncio.Event] = {}
        given.machines = _FileSink.machines = self.machines
        given.storage = self.storage_machine
        given.environment.use(world, network)
        worker.session.setup._numbers = iter(range(1, 1 << 60))  # type: ignore[assignment]
        self.controls = [f"control-{n + 1}" for n in range(settings.controls)]
        self.aggregators = [f"aggregator-{n + 1}" for n in range(settings.aggregators)]
        self.workers = [f"worker-{n + 1}" for n in range(settings.workers)]
        for number, name in enumerate(self.workers[: settings.liars]):
            self.machines.liars[name] = number
        self.machines.unequal = settings.unequal
        self.machines.from_the_first = settings.from_the_first
        self.machines.small.update(self.aggregators[: settings.small])
        if settings.odd:
            self.machines.odd.add(self.workers[0])
        if settings.old:
            self.machines.old.add(self.workers[-1])
            self.machines.odd.add(self.workers[-1])
        if settings.script == "aggregators_gone":
            self.machines.fingerprints[self.aggregators[-1]] = jobs.FINGERPRINTS[1]
        if settings.mixed:
            self.machines.fingerprints[self.workers[-1]] = jobs.FINGERPRINTS[1]
        self.slowness: dict[str, float] = {}
        self.healed = False
        self.lost: set[str] = set()
        """Processes that nothing brings back: what lasts is not healed."""
        self.cut: list[Link] = []
        """Links that stay cut."""

    @property
    def control_addresses(self) -> tuple[str, ...]:
        """Where control may be found."""
        return tuple(f"{name}:{_PORTS['control']}" for name in self.controls)

    @property
    def aggregator_addresses(self) -> tuple[str, ...]:
        """Where aggregators are."""
        return tuple(f"{name}:{_PORTS['aggregator']}" for name in self.aggregators)

    def start_all(self) -> None:
        """Start every process."""
        for name in ("storage", *self.controls, *self.aggregators, *self.workers):
            self.start(name)

    def start(self, name: str) -> Process:
        """Start a process of the kind that its name says."""
        stop = self.stops[name] = asyncio.Event()
        kind = name.rpartition("-")[0] or name
        main = getattr(self, f"_{kind}")
        process = self.world.start(name, lambda: main(name, stop))
        process.wall_offset_ns = clock_off_ns(self.world.seed, name)
        process.on_death.append(lambda: process_died(self.network, process))
        self.alive[name] = process
        return process

    def kill(self, name: str) -> None:
        """End a process as `kill -9` does."""
        process = self.alive.pop(name)
        self.machines.hung.discard(name)
        self.world.resume(process)
        self.world.kill(process)
        if name == "storage":
            self.storage_machine.disk.crash(self.world.chance)

    def lose(self, names: list[str]) -> None:
        """End processes for good."""
        self.lost.update(names)
        for name in names:
            if self.is_alive(name):
                self.kill(name)

    def is_alive(self, name: str) -> bool:
        """Whether the process runs (it may have ended by itself)."""
        process = self.alive.get(name)
        return process is not None and process.alive

    def heal(self) -> None:
        """Make everything work: links, disks, and every process runs."""
        self.network.heal()
        self.network.block(self.cut)
        self.slowness.clear()
        self.machines.hung.clear()
        self.machines.bad.clear()
        self.storage_machine.disk.full = self.storage_machine.disk.failing = False
        for name in ("storage", *self.controls, *self.aggregators, *self.workers):
            self.ensure(name)
            if name not in self.lost:
                self.world.resume(self.alive[name])

    def ensure(self, name: str) -> None:
        """Have a process run that is not about to end; one that takes long to stop is killed."""
        if name in self.lost:
            return
        if self.is_alive(name) and self.stops[name].is_set():
            self.kill(name)
        if not self.is_alive(name):
            self.start(name)

    def _leaf_s(self, worker_name: str) -> float:
        base_s = self.settings.leaf_s * self.world.jitter.uniform(0.8, 1.3)
        return base_s * self.slowness.get(worker_name, 1.0)

    # Mains

    async def _storage(self, name: str, stop: asyncio.Event) -> None:
        config = StorageConfig(
            id=name,
            listen=STORAGE,
            metrics_listen=None,
            state=Path("/state"),
            gc_interval_s=0,
            gc_grace_s=GRACES * self.settings.garbage_s,
            namespace_bytes=self.settings.namespace_bytes,
        )
        await storage.runtime.serve(config, stop)

    async def _control(self, name: str, stop: asyncio.Event) -> None:
        config = ControlConfig(
            id=name,
            listen=f"{name}:{_PORTS['control']}",
            storage=(STORAGE,),
            metrics_listen=None,
            range_min_bytes=self.settings.range_min_bytes,
            snapshot_every_records=self.settings.snapshot_every_records,
            namespace_jobs_max=self.settings.namespace_jobs_max,
            running_jobs_max=self.settings.running_jobs_max,
            namespace_slots_max=self.settings.namespace_slots_max,
            collect_garbage_every_s=self.settings.garbage_s,
            heartbeat_interval_s=0.5,
            lease_ttl_s=LEASE_TTL_S,
        )
        await coordinator.control.process.serve(config, stop)

    async def _aggregator(self, name: str, stop: asyncio.Event) -> None:
        config = AggregatorConfig(
            id=name,
            listen=f"{name}:{_PORTS['aggregator']}",
            control=self.control_addresses,
            storage=(STORAGE,),
            metrics_listen=None,
        )
        await coordinator.aggregation.process.serve(config, stop)

    async def _worker(self, name: str, stop: asyncio.Event) -> None:
        config = WorkerConfig(
            id=name,
            listen=f"{name}:{_PORTS['worker']}",
            control=self.control_addresses,
            storage=(STORAGE,),
            metrics_listen=None,
            slots=self.settings.slots,
            cache_dir=Path("/cache"),
            leaf_timeout_s=self.settings.leaf_timeout_s,
            labels=wishes.labels_of(name) if self.settings.wishes else (),
            slot_memory_bytes=wishes.slot_bytes_of(name) if self.settings.wishes else 0,
        )
        await worker.main.serve(config, stop)
