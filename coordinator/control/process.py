"""One control process: the gRPC server, and leading whenever the lease is ours."""

from __future__ import annotations

import asyncio

from coordinator.control import leadership
from coordinator.control.cluster_servicer import ClusterServicer
from coordinator.control.config import ControlConfig
from coordinator.control.core.facts import Facts
from coordinator.control.event_log import STREAM as EVENTS
from coordinator.control.forwarding import Forwarding, announce_leader, find_leader
from coordinator.control.gauges import Gauges
from coordinator.control.job_servicer import JobServicer
from coordinator.control.journal import replay
from coordinator.control.leader import Leader, leads_no_more
from coordinator.control.sessions import CoordinationServicer
from coordinator.control.store import Store
from coordinator.control.submission import Submissions
from phalanx.errors import Aborted, PhalanxError, Unavailable
from phalanx.quota_file import QuotaFile
from phalanx.rpc.credentials import ClientKeys, ServerKeys
from phalanx.rpc.limits import ServerLimits
from phalanx.rpc.own_address import own_address
from phalanx.rpc.process import announce
from phalanx.rpc.server import FIXED_WINDOWS, Server
from phalanx.telemetry.logs import get_logger
from phalanx.telemetry.metrics import ControlMetrics, new_registry
from phalanx.v1 import (
    cluster_service_pb2,
    cluster_service_pb2_grpc,
    coordination_service_pb2,
    coordination_service_pb2_grpc,
    job_service_pb2,
    job_service_pb2_grpc,
)
from phalanx.v1 import storage_service_pb2 as storage_pb

SERVICE_NAMES = (
    job_service_pb2.DESCRIPTOR.services_by_name["JobService"].full_name,
    cluster_service_pb2.DESCRIPTOR.services_by_name["ClusterService"].full_name,
    coordination_service_pb2.DESCRIPTOR.services_by_name["CoordinationService"].full_name,
)
FORWARDED_SERVICES = SERVICE_NAMES[:2]
SETTLE_S = 1.0

_log = get_logger(__name__)


class ControlProcess:
    """Leads, or stands by: then it hands calls on to the leader and tells members to look there."""

    def __init__(self, config: ControlConfig) -> None:
        self.config = config
        registry = new_registry("control", config.id)
        metrics = ControlMetrics(registry)
        self.gauges = Gauges(metrics)
        keys = ClientKeys.of(config)
        self._forwarding = Forwarding(FORWARDED_SERVICES, lambda: self._leader is not None, keys)
        self.server = Server(
            listen=config.listen,
            metrics_listen=config.metrics_listen,
            probe_listen=config.probe_listen,
            service_names=SERVICE_NAMES,
            reflection=config.reflection,
            registry=registry,
            limits=ServerLimits.of(config),
            options=FIXED_WINDOWS,
            interceptors=[self._forwarding],
            keys=ServerKeys.of(config, config.tokens),
            public_listen=config.public_listen,
        )
        self.store = Store(",".join(config.storage), keys)
        metrics.storage_available.set_function(lambda: float(self.store.available))
        self._leader: Leader | None = None
        self._announced = False
        self._followed = 0
        self._quotas = QuotaFile(config.quotas)
        self._submissions = Submissions(config, self.store)
        job_service_pb2_grpc.add_JobServiceServicer_to_server(
            JobServicer(self, self._submissions), self.server.raw
        )
        cluster_service_pb2_grpc.add_ClusterServiceServicer_to_server(
            ClusterServicer(self), self.server.raw
        )
        coordination_service_pb2_grpc.add_CoordinationServiceServicer_to_server(
            CoordinationServicer(self), self.server.raw
        )

    def leading(self) -> Leader:
        """Return the leadership of this process. Raises Unavailable while it has none."""
        if self._leader is None:
            raise Unavailable(
                f"control process {self.config.id} does not lead (yet); try again",
                reason="NOT_LEADER",
                retry_after_s=0.2,
            )
        return self._leader

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set."""
        await self.server.start()
        leading = asyncio.create_task(self._lead_again_and_again())
        stopped = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait((leading, stopped), return_when=asyncio.FIRST_COMPLETED)
            if leading.done():
                leading.result()
        finally:
            stopped.cancel()
            leading.cancel()
            await asyncio.gather(leading, return_exceptions=True)
            await self.server.stop()
            await self._forwarding.leader_is_at("")
            await self.store.close()

    async def _lead_again_and_again(self) -> None:
        self.gauges.leads(0)
        while True:
            lease_ttl_s = self.config.lease_ttl_s
            acquired = await leadership.acquire(
                self.store, self.config.id, lease_ttl_s, self._follow
            )
            generation = acquired.generation
            self.store.fence = storage_pb.Fence(lease="leader", token=generation)
            keeper = asyncio.create_task(
                leadership.keep(self.store, self.config.id, generation, lease_ttl_s)
            )
            telling = asyncio.create_task(self._tell_where(generation))
            try:
                leader = await self._replay(acquired)
                leader.start(acquired.lost)
                self._leader = leader
                await self._forwarding.leader_is_at("")
                self.gauges.leads(generation)
                self._set_serving(SERVICE_NAMES)
                self._announce()
                await asyncio.wait((keeper, leader.failed), return_when=asyncio.FIRST_COMPLETED)
                error = keeper.result() if keeper.done() else leader.failed.result()
                await self._step_down(error)
            except asyncio.CancelledError:
                await self._hand_over(generation)
                raise
            except PhalanxError as error:
                if not isinstance(error, Aborted | Unavailable):
                    raise  # a damaged journal: a person must look
                await self._step_down(error)
            finally:
                keeper.cancel()
                telling.cancel()

    async def _tell_where(self, generation: int) -> None:
        """Let the others know where this leader is reached, as soon as storage takes it."""
        address = self.config.advertise
        try:
            if not address:
                address = await own_address(
                    self.server.address, self.config.storage, asyncio.Event()
                )
            await announce_leader(self.store, generation, self.config.id, address)
        except PhalanxError as error:
            _log.warning("leader_not_announced", reason=error.reason, message=error.message)

    async def _follow(self, lease: storage_pb.Lease) -> None:
        """Another process holds the lease: find out where it is, and hand calls on to it."""
        self._announce()
        if lease.token == self._followed:
            return
        try:
            address = await find_leader(self.store, lease.token)
        except PhalanxError as error:
            _log.debug("leader_not_found", message=error.message)
            return
        await self._forwarding.leader_is_at(address)
        self._followed = lease.token if address else 0
        # What it hands on it serves; members hold their sessions with the leader itself.
        self._set_serving(FORWARDED_SERVICES if address else ())

    def _announce(self) -> None:
        """Say once that this process does what it is there for: leads, or stands by."""
        if not self._announced:
            self._announced = True
            announce(
                self.config,
                role="control",
                address=self.server.address,
                metrics_address=self.server.metrics_address,
            )

    async def _replay(self, acquired: leadership.Acquired) -> Leader:
        """Rebuild the durable state, twice: one copy for decisions, one for what is safe."""
        facts, following, count = await self.store.insist(lambda: replay(self.store))
        durable = Facts()
        for record in facts.snapshot():
            durable.apply(record)
        durable.generation = facts.generation
        events = await self.store.insist(lambda: self.store.next_sequence(EVENTS))
        _log.info("journal_replayed", records=count, jobs=len(facts.jobs))
        return Leader(
            self.config,
            self.store,
            self.gauges,
            generation=acquired.generation,
            history=acquired.history,
            quotas=self._quotas,
            replayed=(facts, durable),
            control_sequence=(following, count),
            event_sequence=events,
            submitting=self._submissions.under_way,
        )

    async def _step_down(self, error: PhalanxError) -> None:
        """Stop leading; what callers and members were told stays true."""
        _log.warning("steps_down", reason=error.reason, message=error.message)
        self._followed = 0
        self._set_serving(())
        self.gauges.leads(0)
        leader, self._leader = self._leader, None
        if leader is not None:
            await leader.stop(leads_no_more())

    async def _hand_over(self, generation: int) -> None:
        """End in good order: write what is left, release the lease."""
        self._set_serving(())
        leader, self._leader = self._leader, None
        if leader is not None:
            leader.sessions.end_all(leads_no_more())
            await leader.settle(SETTLE_S)
            await leader.stop(leads_no_more())
        await leadership.release(self.store, self.config.id, generation)

    def _set_serving(self, served: tuple[str, ...]) -> None:
        """Say in health which services can be used here; with any of them this process is well."""
        self.server.set_serving(bool(served))
        for name in SERVICE_NAMES:
            self.server.set_serving(name in served, name)


async def serve(config: ControlConfig, stop: asyncio.Event) -> None:
    """Run one control process until `stop` is set."""
    await ControlProcess(config).run(stop)
