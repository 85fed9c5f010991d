"""The model of a job that keeps its best evaluation, out of the final checkpoint."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import grpc
import pytest

from phalanx.testing.members import ScriptedAggregator, ScriptedWorker
from phalanx.v1 import model_service_pb2
from phalanx.v1 import storage_service_pb2 as storage_pb
from phalanx.v1.job_spec_pb2 import Output, Threshold

GUARD_S = 30.0
BEST = {
    "step": 10,
    "metric": "test/accuracy",
    "direction": 1,
    "value": 0.9375,
    "metrics": {"test/accuracy": 0.9375, "train/loss": 0.5},
}
OUTPUT = Output(best=Threshold(metric="test/accuracy"))


@pytest.fixture
async def ended(cluster: Any) -> Any:
    """Runs a job up to the final checkpoint that a test wants, and waits for a state."""

    async def run(state: str, step: int = 40, **saved: Any) -> Any:
        async with (
            ScriptedAggregator(cluster.control_address, "a1") as aggregator,
            ScriptedWorker(cluster.control_address, "w1"),
        ):
            job = await cluster.submit(output=OUTPUT)
            await aggregator.wait_for("assign_ranges")
            run.parameters = await cluster.finish(aggregator, job.id, step, **saved)
            return await cluster.wait_for_state(job.id, state)

    return run


async def description(cluster: Any) -> tuple[dict[str, Any], str]:
    request = model_service_pb2.GetModelRequest(namespace="default", name="job")
    model = (await cluster.models().GetModel(request, timeout=GUARD_S)).model
    digests = {file.path: file.digest for file in model.files}
    texts = []
    for path in ("model.json", "README.md"):
        call = cluster.store().GetBlob(
            storage_pb.GetBlobRequest(digest=digests[path]), timeout=GUARD_S
        )
        texts.append(b"".join([each.chunk async for each in call]).decode())
    return json.loads(texts[0]), texts[1]


async def test_it_has_the_parameters_of_the_best_evaluation(cluster: Any, ended: Any) -> None:
    job = await ended("SUCCEEDED", best=BEST, best_offset=68)
    result, kept = job.result, ended.parameters[::-1]
    assert result.parameters_sha256 == hashlib.sha256(kept).hexdigest()
    assert (result.steps, result.best.step, result.best.value) == (40, 10, 0.9375)
    assert dict(result.metrics) == BEST["metrics"]
    assert job.progress.step == 40
    document, readme = await description(cluster)
    assert (document["steps"], document["job_steps"]) == (10, 40)
    assert document["best"] == {"step": 10, "metric": "test/accuracy", "value": 0.9375}
    assert document["metrics"] == BEST["metrics"]
    assert document["parameters_sha256"] == result.parameters_sha256
    assert "the parameters of step 10 of 40: the best evaluation of the job" in readme


async def test_the_last_step_may_be_the_best(cluster: Any, ended: Any) -> None:
    job = await ended("SUCCEEDED", best=BEST, step=10)
    assert job.result.parameters_sha256 == hashlib.sha256(ended.parameters).hexdigest()
    assert (job.result.steps, job.result.best.step) == (10, 10)
    document, _ = await description(cluster)
    assert (document["steps"], document["job_steps"]) == (10, 10)


async def test_without_an_evaluation_within_the_bound_it_is_the_last_step(
    cluster: Any, ended: Any
) -> None:
    job = await ended("SUCCEEDED")
    assert job.result.parameters_sha256 == hashlib.sha256(ended.parameters).hexdigest()
    assert not job.result.HasField("best")
    document, readme = await description(cluster)
    assert (document["steps"], document["best"]) == (40, None)
    assert "the parameters of the last step" in readme


async def test_a_final_checkpoint_without_what_its_root_says_fails_the_job(
    cluster: Any, ended: Any
) -> None:
    job = await ended("FAILED", best=BEST)
    assert "does not hold the parameters of the best evaluation" in job.message
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await description(cluster)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
