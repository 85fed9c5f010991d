"""ClusterService: what operators ask about members and events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import phalanx
from coordinator.control.config import client_storage_address
from coordinator.control.core import events as ev
from coordinator.control.core.views import cluster_view, worker_view
from coordinator.control.job_servicer import remember
from coordinator.control.paging import Page
from coordinator.control.visibility import hide_jobs, is_visible
from phalanx.errors import InvalidArgument, Unavailable, Violation
from phalanx.rpc.types import ServicerContext
from phalanx.v1 import cluster_service_pb2 as pb
from phalanx.v1 import cluster_service_pb2_grpc as pb_grpc

if TYPE_CHECKING:
    from coordinator.control.process import ControlProcess

FOLLOW_POLL_S = 5.0


class ClusterServicer(pb_grpc.ClusterServiceServicer):
    """Shows the cluster as the leader sees it."""

    def __init__(self, process: ControlProcess) -> None:
        self._process = process

    async def GetCluster(
        self, request: pb.GetClusterRequest, context: ServicerContext
    ) -> pb.GetClusterResponse:
        """Return the cluster at a glance."""
        leader = self._process.leading()
        view = cluster_view(leader.core)
        facts = leader.core.facts
        for worker in view.workers:
            hide_jobs(facts, worker)
        for aggregator in view.aggregators:
            shown = [each for each in aggregator.job_ids if is_visible(facts, each)]
            aggregator.job_ids[:] = shown
        view.version = phalanx.__version__
        view.leader = self._process.config.id
        view.storage_address = client_storage_address(self._process.config)
        view.storage_available = self._process.store.available
        view.incomplete = leader.incomplete()
        return view

    async def ListWorkers(
        self, request: pb.ListWorkersRequest, context: ServicerContext
    ) -> pb.ListWorkersResponse:
        """List the workers by their ids.

        When one joined changes as it joins again: pages by that would pass over it, or list it
        twice, and between those of two leaders over all.
        """
        leader = self._process.leading()
        core, incomplete = leader.core, leader.incomplete()
        page = Page(request.page_size, request.page_token)
        taken, following = page.take(core.workers.values(), lambda worker: (0, worker.id))
        workers = [hide_jobs(core.facts, worker_view(core, worker)) for worker in taken]
        return pb.ListWorkersResponse(
            workers=workers, next_page_token=following, incomplete=incomplete
        )

    async def DrainWorker(
        self, request: pb.DrainWorkerRequest, context: ServicerContext
    ) -> pb.DrainWorkerResponse:
        """Have a worker finish and leave."""
        leader, remembered = self._process.leading(), remember("DrainWorker", request)
        answer = await leader.request(
            lambda token: ev.DrainWorker(token, request.worker_id, remembered)
        )
        assert isinstance(answer, pb.DrainWorkerResponse)
        return answer

    async def ListEvents(
        self, request: pb.ListEventsRequest, context: ServicerContext
    ) -> AsyncIterator[pb.ListEventsResponse]:
        """Show the events in order; with `follow` for as long as the caller listens.

        Without, the end says that these were all: where there may be more, Unavailable does.
        """
        if request.after_sequence < 0:
            message = "must not be negative"
            raise InvalidArgument(
                f"after_sequence {message}", violations=[Violation("after_sequence", message)]
            )
        leader = self._process.leading()
        wake, position = asyncio.Event(), request.after_sequence
        leader.event_log.subscribe(wake)
        try:
            while True:
                leader.watchers.check_open()
                wake.clear()
                async for event in leader.event_log.read(position):
                    position = event.sequence
                    wanted = not request.job_id or event.job_id == request.job_id
                    if wanted and is_visible(leader.core.facts, event.job_id):
                        yield pb.ListEventsResponse(event=event)
                if not request.follow:
                    if incomplete := leader.incomplete():
                        raise Unavailable(incomplete, reason="INCOMPLETE")
                    return
                try:
                    await asyncio.wait_for(wake.wait(), FOLLOW_POLL_S)
                except TimeoutError:
                    continue
        finally:
            leader.event_log.unsubscribe(wake)
