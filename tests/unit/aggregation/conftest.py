"""Jobs on the aggregator's core, for the tests of its rules."""

from __future__ import annotations

import random
from typing import Any

import pytest

from coordinator.aggregation.core.effects import StartCheckpoint
from coordinator.aggregation.core.machine import JobRanges
from coordinator.aggregation.core.making import make_ranges
from phalanx.testing.ranges import ScriptedJob
from phalanx.v1.training_pb2 import GoRecord, JobPlan, ParameterRange


class Jobs:
    """Makes scripted jobs and looks into them."""

    @staticmethod
    def make_owner(plan: JobPlan, term: int, owned: list[ParameterRange]) -> JobRanges:
        return make_ranges(plan, term, owned)

    def scripted(self, plan: JobPlan, owners: Any = ((0,),), term: int = 1) -> ScriptedJob:
        """A job that did not begin."""
        return ScriptedJob(self.make_owner, plan, owners, term)

    def started(self, plan: JobPlan, owners: Any = ((0,),)) -> ScriptedJob:
        """A job at version 0, with the go record of its first step."""
        job = self.scripted(plan, owners)
        job.begin()
        job.run_round()
        return job

    def finished(
        self, plan: JobPlan, owners: Any = ((0,),), seed: int | None = None
    ) -> ScriptedJob:
        """A job that ran to its end, its frames shuffled by the seed."""
        job = self.scripted(plan, owners)
        job.begin()
        go = job.run(None if seed is None else random.Random(seed))
        assert go.action == GoRecord.ACTION_STOP, go
        return job

    @staticmethod
    def final_bytes(job: ScriptedJob) -> bytes:
        return bytes(job.vector(job.plan.total_steps).tobytes())

    @staticmethod
    def checkpoints(job: ScriptedJob) -> list[StartCheckpoint]:
        return [effect for effect in job.effects if isinstance(effect, StartCheckpoint)]


@pytest.fixture
def jobs() -> Jobs:
    return Jobs()
