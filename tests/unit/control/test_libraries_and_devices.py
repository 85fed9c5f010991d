"""Workers without the library or the GPUs of a job take no part in it, and the job says so."""

from __future__ import annotations

from typing import Any

import pytest

from coordinator.control.core.eligibility import group_of, needed_bytes
from phalanx.v1.control_journal_pb2 import JobSubmitted
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import Layout
from tests.unit.control.conftest import DATASET

HAS_TORCH = {"libraries": {"torch": "2.13.0"}}
LACKS_TORCH = (
    "it has no PyTorch, which train.model.torch needs (pip install 'phalanx[torch]' there)"
)
LACKS_TORCH_OF_MODEL = (
    "it has no PyTorch, which the model pictures@3 needs (pip install 'phalanx[torch]' there)"
)


def torch_job(spec: JobSpec) -> None:
    spec.train.model.ClearField("mlp")
    spec.train.model.torch.module = "net:build"
    spec.code.files["net.py"] = "pass"


def on_gpus(count: int) -> Any:
    def edit(spec: JobSpec) -> None:
        spec.train.model.ClearField("mlp")
        spec.train.model.custom.entrypoint = "net:build"
        spec.resources.gpus = count

    return edit


def excluded(cluster: Any, job_id: str = "job-1") -> dict[str, str]:
    return group_of(cluster.core, cluster.core.jobs[job_id]).excluded


def test_a_worker_without_torch_is_left_out_and_named(cluster: Any) -> None:
    cluster.worker("w1")
    cluster.aggregator()
    cluster.submit(edit=torch_job)
    view = cluster.job()
    assert view.reason == "WAITING_FOR_WORKERS"
    assert f"w1 is left out: {LACKS_TORCH}" in view.message
    cluster.worker("w2", **HAS_TORCH)
    cluster.advance(1.0)
    assert excluded(cluster) == {"w1": LACKS_TORCH}
    assert cluster.state() == "RUNNING"


def test_other_jobs_ask_for_no_library(cluster: Any) -> None:
    cluster.worker("w1")
    cluster.aggregator()
    cluster.submit()
    assert excluded(cluster) == {}


@pytest.mark.parametrize(
    ("gpus", "slots", "each", "why"),
    [
        (0, 2, 0, ""),
        (-1, 2, 0, ""),
        (0, 2, 1, "it has no GPU"),
        (-3, 2, 1, "it has no GPU"),
        (2, 2, 1, ""),
        (4, 2, 2, ""),
        (
            *(1, 2, 1),
            "it has 1 GPU for 2 slots, and the job needs 1 for each (start it with fewer --slots)",
        ),
        (
            *(3, 2, 2),
            "it has 3 GPUs for 2 slots, and the job needs 2 for each (start it with fewer --slots)",
        ),
    ],
)
def test_every_slot_needs_its_gpus(
    cluster: Any, gpus: int, slots: int, each: int, why: str
) -> None:
    cluster.worker("w1", slots=slots, gpus=gpus)
    cluster.aggregator()
    cluster.submit(edit=on_gpus(each))
    assert excluded(cluster).get("w1", "") == why


def test_a_module_has_parameters_and_gradients_of_its_own(cluster: Any) -> None:
    cluster.worker("w1", **HAS_TORCH)
    cluster.aggregator()
    cluster.submit(edit=torch_job)
    cluster.submit("job-2", edit=on_gpus(0))
    layout = Layout(dtype="float32", element_count=1_000_000)
    facts = [cluster.core.facts_of(cluster.core.jobs[name]) for name in ("job-1", "job-2")]
    module, custom = (needed_bytes(each, layout) for each in facts)
    assert module - custom == pytest.approx(3 * 4 * 1_000_000, rel=0.01)


def of_a_stored_model(program: str, gpus: int = 0) -> JobSpec:
    spec = JobSpec(name="score")
    spec.data.name, spec.data.shards, spec.resources.gpus = "digits", 4, gpus
    getattr(spec, program).model = "pictures@3"
    return spec


def with_torch(submitted: JobSubmitted) -> None:
    submitted.model_libraries.append("torch")


@pytest.mark.parametrize("program", ["evaluate", "predict"])
def test_a_worker_that_cannot_compute_the_stored_model_is_left_out_and_named(
    cluster: Any, program: str
) -> None:
    cluster.worker("w1")
    cluster.aggregator()
    cluster.submit_spec(of_a_stored_model(program), DATASET, "job-1", change=with_torch)
    view = cluster.job()
    assert view.reason == "WAITING_FOR_WORKERS"
    assert f"w1 is left out: {LACKS_TORCH_OF_MODEL}" in view.message
    cluster.worker("w2", **HAS_TORCH)
    cluster.advance(1.0)
    assert excluded(cluster) == {"w1": LACKS_TORCH_OF_MODEL}
    assert cluster.state() == "RUNNING"


def test_a_stored_model_on_gpus_needs_its_library_and_a_gpu_of_the_same_worker(
    cluster: Any,
) -> None:
    cluster.worker("w1", slots=1, gpus=1)
    cluster.worker("w2", slots=1, **HAS_TORCH)
    cluster.aggregator()
    cluster.submit_spec(of_a_stored_model("predict", 1), DATASET, "job-1", change=with_torch)
    assert excluded(cluster) == {"w1": LACKS_TORCH_OF_MODEL, "w2": "it has no GPU"}
    cluster.worker("w3", slots=1, gpus=1, **HAS_TORCH)
    cluster.advance(1.0)
    assert cluster.state() == "RUNNING"
    assert set(cluster.core.jobs["job-1"].hosts) == {"w3"}


def test_a_job_of_an_earlier_version_tells_nothing_of_its_model_and_runs_as_it_did(
    cluster: Any,
) -> None:
    cluster.worker("w1")
    cluster.aggregator()
    cluster.submit_spec(of_a_stored_model("evaluate"), DATASET, "job-1")
    assert excluded(cluster) == {}
    assert cluster.state() == "RUNNING"


def test_a_library_that_only_a_newer_version_knows_is_asked_for_by_its_package(
    cluster: Any,
) -> None:
    cluster.worker("w1", **HAS_TORCH)
    cluster.aggregator()
    cluster.submit_spec(
        of_a_stored_model("evaluate"),
        DATASET,
        "job-1",
        change=lambda submitted: submitted.model_libraries.append("jax"),
    )
    why = "it has no jax, which the model pictures@3 needs (pip install 'phalanx[jax]' there)"
    assert excluded(cluster) == {"w1": why}
