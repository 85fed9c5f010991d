"""Preparing jobs: whoever leads has other things to do meanwhile."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from google.protobuf.json_format import ParseDict

from coordinator.control.config import ControlConfig
from coordinator.control.core.facts import Facts
from coordinator.control.core.state import Core, CoreConfig, Worker
from coordinator.control.store import Store
from coordinator.control.submission import Submissions
from phalanx import specs
from phalanx.errors import InvalidArgument, Violation
from phalanx.layouts import size_bytes
from phalanx.models import DataSchema, build_model
from phalanx.testing.datasets import classification, store
from phalanx.testing.plans import dataset_message
from phalanx.v1.cluster_service_pb2 import Worker as WorkerView
from phalanx.v1.control_journal_pb2 import JobSubmitted
from phalanx.v1.coordination_service_pb2 import WorkerHello
from phalanx.v1.dataset_service_pb2 import Dataset, GetDatasetResponse
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.model_service_pb2 import GetModelResponse, ModelFile, ModelVersion
from phalanx.v1.training_pb2 import Layout, TensorSpec
from tests.unit.data.finished_models import write_finished_model


async def test_others_have_their_turn_while_the_jobs_of_a_sweep_are_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
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

    threads: dict[str, set[bool]] = {}

    def note(name: str, work: Any) -> None:
        def noted(*args: Any, **more: Any) -> Any:
            here = threading.current_thread() is threading.main_thread()
            threads.setdefault(name, set()).add(here)
            return work(*args, **more)

        monkeypatch.setattr(specs, name, noted)

    note("prepare", specs.prepare)
    note("job_plan", specs.job_plan)
    note("plan", specs.plan)
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
    assert threads == {"prepare": {False}, "job_plan": {False}, "plan": {False}}
    assert submitted.plan.total_steps == 5 * 100 + 6


def mlp() -> tuple[JobSpec, Any]:
    spec = ParseDict({"train": {"model": {"mlp": {"hidden": [512, 512]}}}}, JobSpec())
    spec.train.dtype = "float32"
    return spec, build_model(spec, DataSchema(4, 3, "float32"), None)


def module() -> tuple[JobSpec, Any]:
    """A PyTorch module as its description has it, whether PyTorch is there or not."""
    train = {"dtype": "float32", "model": {"torch": {"module": "net:build"}}}
    spec = ParseDict({"train": train, "code": {"files": {"net.py": "1 / 0"}}}, JobSpec())
    tensors = [TensorSpec(name="w", shape=[3, 4])]
    layout = Layout(dtype="float32", element_count=12, tensors=tensors)
    return spec, SimpleNamespace(layout=layout)


Submit = Callable[..., Awaitable[JobSubmitted]]


@pytest.fixture
def submit(tmp_path: Path) -> Submit:
    """Submits a program for the stored model net@3, which a job of `spec` left."""

    async def prepared(program: str, spec: JobSpec, model: Any, **more: Any) -> JobSubmitted:
        data = store(tmp_path / "data", *classification(60, 4))
        write_finished_model(tmp_path / "model", data.manifest, spec, model)
        names = ("model.json", "model.safetensors")
        version = ModelVersion(name="net", version=3)
        version.files.extend(ModelFile(path=name, digest=f"of {name}") for name in names)
        dataset = dataset_message(data)

        async def call(method: str, _: Any) -> Any:
            return {
                "dataset": GetDatasetResponse(dataset=dataset),
                "model": GetModelResponse(model=version),
            }[method]

        async def get_blob(digest: str) -> bytes:
            if digest == dataset.manifest_digest:
                return data.manifest.to_json()
            return (tmp_path / "model" / digest.removeprefix("of ")).read_bytes()

        store_ = SimpleNamespace(
            call=call,
            get_blob=get_blob,
            datasets=SimpleNamespace(GetDataset="dataset"),
            models=SimpleNamespace(GetModel="model"),
        )
        document = {"name": "score", "data": {"name": "data"}, program: {"model": "net"}, **more}
        submissions = Submissions(ControlConfig(), cast("Store", store_))
        core = Core(CoreConfig(), 1, Facts())
        for name, libraries in {"w1": {}, "w2": {"torch": "2.13.0"}}.items():
            hello = WorkerHello(worker_id=name, slots=1, gpus=1, libraries=libraries)
            core.workers[name] = Worker(hello, 1, WorkerView.STATE_READY, 0, 0.0)
        submitted, _ = await submissions.prepare(ParseDict(document, JobSpec()), core, "somebody")
        return submitted

    return prepared


@pytest.mark.parametrize("program", ["evaluate", "predict"])
async def test_the_model_that_rows_go_through_counts_as_memory(
    submit: Submit, program: str
) -> None:
    """Else a worker gets the job whose memory the model is more than."""
    spec, model = mlp()
    submitted = await submit(program, spec, model)
    assert submitted.worker_bytes > size_bytes(model.layout) > 2**20
    assert submitted.announced_plan.worker_bytes == submitted.worker_bytes
    assert list(submitted.model_libraries) == []
    assert submitted.announced_plan.eligible_workers == 2


@pytest.mark.parametrize("program", ["evaluate", "predict"])
@pytest.mark.parametrize("gpus", [0, 1])
async def test_only_workers_that_can_compute_the_stored_model_are_counted(
    submit: Submit, program: str, gpus: int
) -> None:
    """Its code, which would fail here, is not run to find out."""
    submitted = await submit(program, *module(), resources={"gpus": gpus})
    assert list(submitted.model_libraries) == ["torch"]
    assert submitted.announced_plan.eligible_workers == 1


@pytest.mark.parametrize(
    ("stored", "gpus", "why"),
    [
        (mlp, 1, "mlp computes on CPUs; leave it out, or use a model of train.model.torch"),
        (module, 2, "a PyTorch module computes on one GPU per slot; use 1"),
    ],
)
async def test_gpus_that_the_stored_model_has_no_use_for_are_refused(
    submit: Submit, stored: Callable[[], Any], gpus: int, why: str
) -> None:
    """Else the job waits for workers with GPUs which it never touches."""
    with pytest.raises(InvalidArgument) as caught:
        await submit("evaluate", *stored(), resources={"gpus": gpus})
    violation = Violation("resources.gpus", f"for the model net@3: {why}")
    assert (caught.value.reason, caught.value.violations) == ("SPEC_INVALID", (violation,))
