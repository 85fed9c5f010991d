"""Preparing jobs: whoever leads has other things to do meanwhile."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

from google.protobuf.json_format import ParseDict

from coordinator.control.config import ControlConfig
from coordinator.control.core.facts import Facts
from coordinator.control.core.state import Core, CoreConfig
from coordinator.control.store import Store
from coordinator.control.submission import Submissions
from phalanx.v1.dataset_service_pb2 import Dataset, GetDatasetResponse
from phalanx.v1.job_spec_pb2 import JobSpec


async def test_others_have_their_turn_while_the_jobs_of_a_sweep_are_checked() -> None:
    dataset = Dataset(
        namespace="default",
        name="data",
        version=1,
        rows={"train": 100},
        features=3,
        task="regression",
        format="dense",
        manifest_digest="a" * 64,
    )

    async def answer(*_: Any) -> GetDatasetResponse:
        return GetDatasetResponse(dataset=dataset)

    store = SimpleNamespace(call=answer, datasets=SimpleNamespace(GetDataset=None))
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    base = {"train": {"model": {"linear_regression": {}}, "stop": {"steps": 5}}}
    document = {
        "name": "search",
        "data": {"name": "data"},
        "sweep": {"base": base, "grid": {"train.l2": [each / 100 for each in range(100)]}},
    }
    submissions = Submissions(ControlConfig(), cast("Store", store))
    core = Core(CoreConfig(), 1, Facts())
    busy = asyncio.create_task(others())
    submitted, _ = await submissions.prepare(ParseDict(document, JobSpec()), core, "somebody")
    busy.cancel()
    # Nothing that it is answered lets anybody wait here.
    assert turns > 0
    assert submitted.plan.total_steps == 5 * 100 + 6
