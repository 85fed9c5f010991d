"""A third user of the simulated cluster: her jobs are worse, she asks for too much, and at once.

Her models cannot be built, or not in time; steps are left out whole, or overflow; leaves print more
than anybody reads. She asks for more slots than her quota and more memory than there is, and
changes her mind twice at the same time. Each answer is checked, and how each of her jobs ends.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from phalanx.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from phalanx.testing.simulation.loop import SimulationFailed
from phalanx.v1 import job_service_pb2
from tests.simulation import jobs
from tests.simulation.cluster import STORAGE, Cluster
from tests.simulation.neighbour import SHAPE, Neighbour
from tests.simulation.user import ENDED, Job, put_data

NAMESPACE = "newcomers"
SLOTS_MAX = 3
"""The quota of each namespace, in clusters that have her."""

BAD = ("void", "overflow", "chatty", "undescribed", "endless")
FAILS = {
    "overflow": ("PARAMETERS_NON_FINITE",),
    "undescribed": ("BROKEN_MODEL", "JOB_CODE"),
    "endless": ("JOB_CODE",),
}
"""How jobs of hers fail, by what is bad; others succeed."""

Pb = job_service_pb2


class Newcomer(Neighbour):
    """Runs in a process of her own."""

    name, namespace = "newcomer", NAMESPACE

    def __init__(
        self, cluster: Cluster, chance: random.Random, fingerprints: Mapping[str, str]
    ) -> None:
        super().__init__(cluster, chance, fingerprints)
        self.refused = 0
        """Jobs that asked for more than she may have, or than there is."""

    async def _run(self) -> None:
        await put_data(STORAGE, self._chance, NAMESPACE)
        errands = (
            *(self._bad_job(bad) for bad in BAD),
            self._insists,
            self._asks_for_slots,
            self._asks_for_memory,
            self._cancels_twice,
        )
        while not self._cluster.healed or self._jobs:
            able: Any = () if self._cluster.healed else errands
            for errand in self._chance.sample(able, len(able)):
                try:
                    await errand()
                    self.errands += 1
                except (Unavailable, DeadlineExceeded, ResourceExhausted):
                    pass  # something is broken, or the disk is full; another time
                await self._look()
                await asyncio.sleep(self._chance.uniform(0.1, 0.4))
            await self._look()
            await asyncio.sleep(0.5)

    async def _look(self) -> None:
        with suppress(Unavailable, DeadlineExceeded, ResourceExhausted):
            await self._look_at_bad_jobs()

    def _judge(self, job: Any, shape: jobs.Shape) -> None:
        told = f"{Job.State.Name(job.state)}: {job.reason}: {job.message}"
        wanted = FAILS.get(shape.bad, ())
        if wanted:
            if job.state != Job.STATE_FAILED or job.reason not in wanted:
                raise SimulationFailed(f"{job.id} ended as {told}, and should by {wanted}")
        elif job.state == Job.STATE_SUCCEEDED:
            self._judge_result(job, shape)
        elif job.reason != "POISON_SHARD":  # its leaf may have hung besides
            raise SimulationFailed(f"{job.id} ended as {told}")
        self.ends[shape.bad] = self.ends.get(shape.bad, 0) + 1

    async def _insists(self) -> None:
        """A call that is repeated gets the first answer, and none where its job is gone."""
        try:
            job = await self._submit(replace(SHAPE, steps=60))
        except ResourceExhausted:
            return
        pause = Pb.PauseJobRequest(job_id=job.id, request_id=f"pause-{job.id}")
        cancel = Pb.CancelJobRequest(job_id=job.id, request_id=f"cancel-{job.id}")
        await self._attempt(self._control("PauseJob", pause))
        await self._control("CancelJob", cancel)
        delete = Pb.DeleteJobRequest(job_id=job.id, request_id=f"delete-{job.id}")
        await self._control("DeleteJob", delete)
        await self._refused(NotFound, "CancelJob", cancel)

    async def _asks_for_slots(self) -> None:
        """Jobs that insist on more slots together than her quota are not all taken, unless one is
        over: it was, if its answer came late."""
        made: list[Any] = []

        def insist(spec: Any) -> None:
            spec.resources.min_workers = SLOTS_MAX - 1

        for _ in range(2):
            try:
                made.append(await self._submit(replace(SHAPE, steps=60), insist))
            except ResourceExhausted as error:
                self.refused += error.reason == "QUOTA_EXCEEDED"
        if len(made) > 1:
            first = (await self._control("GetJob", Pb.GetJobRequest(job_id=made[0].id))).job
            self._demand(first.state in ENDED, "she got more slots than her quota")
        for job in made:
            await self._attempt(self._cancel(job.id, "slots"))

    async def _asks_for_memory(self) -> None:
        """A model that fits no worker is refused, unless none is there to be asked."""

        def grow(spec: Any) -> None:
            spec.train.model.mlp.hidden[:] = [1 << 16, 1 << 16]

        try:
            job = await self._submit(SHAPE, grow)
        except ResourceExhausted as error:
            self.refused += error.reason == "JOB_TOO_LARGE"
            return
        await self._attempt(self._cancel(job.id, "memory"))

    async def _cancels_twice(self) -> None:
        """Two calls that end the same job at once, and others that come too late."""
        try:
            job = await self._submit(replace(SHAPE, steps=60))
        except ResourceExhausted:
            return
        await asyncio.sleep(self._chance.uniform(0.0, 2.0))
        late = (
            ("PauseJob", Pb.PauseJobRequest(job_id=job.id, request_id=f"late-{job.id}")),
            ("ResumeJob", Pb.ResumeJobRequest(job_id=job.id, request_id=f"later-{job.id}")),
        )
        calls: list[Awaitable[Any]] = [self._cancel(job.id, name) for name in ("one", "two")]
        calls += [self._control(method, request) for method, request in late]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        for answer in answers:
            known = FailedPrecondition | Unavailable | DeadlineExceeded | ResourceExhausted
            if isinstance(answer, BaseException) and not isinstance(answer, known):
                raise answer
        if not all(isinstance(answer, BaseException) for answer in answers[:2]):
            ended = (await self._control("GetJob", Pb.GetJobRequest(job_id=job.id))).job
            cancelled = ended.state == Job.STATE_CANCELLED
            self._demand(cancelled, f"{job.id} was cancelled, and is not: {ended.state}")

    async def _cancel(self, job_id: str, name: str) -> Any:
        request = Pb.CancelJobRequest(job_id=job_id, request_id=f"cancel-{name}-{job_id}")
        return await self._control("CancelJob", request)
