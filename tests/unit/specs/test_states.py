"""States that go with nodes from version to version: which jobs have them, and what they cost."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from phalanx import specs
from phalanx.errors import InvalidArgument
from phalanx.optimizers import build_local_optimizer
from phalanx.specs.parts import inner_vectors, unit_span
from phalanx.specs.plan import worker_bytes
from phalanx.v1.dataset_service_pb2 import Dataset
from phalanx.v1.job_spec_pb2 import JobSpec

MakeDataset = Callable[..., Dataset]
BASE = "name: job\ndata: {name: fashion}\ntrain: {model: {mlp: {hidden: [8]}}, batch_size: 4096}"
LOCAL = "train.local={steps: 4}"
MOMENTUM = "train.optimizer={sgd: {momentum: 0.9}}"
INNER = {
    "{sgd: {momentum: 0.9}}": "sgd.momentum",
    "{sgd: {momentum: 0.9, nesterov: true}}": "sgd.momentum",
    "{adagrad: {}}": "adagrad",
    "{adam: {}}": "adam",
    "{adamw: {}}": "adamw",
}


def edited(*settings: str) -> JobSpec:
    return specs.apply_sets(specs.load_yaml(BASE), settings)


def complaints(dataset: Dataset, *settings: str) -> dict[str, str]:
    try:
        specs.prepare(edited(*settings), dataset)
    except InvalidArgument as error:
        return {each.field: each.message for each in error.violations}
    return {}


@pytest.mark.parametrize("optimizer", INNER)
@pytest.mark.parametrize(
    ("setting", "field", "says"),
    [
        ("all_reduce={}", "", "with all_reduce there are none; use parameter_server"),
        ("verification={replicas: 3}", "", "copies say nothing of other workers"),
        ("verification={audit_fraction: 0.5}", "", "leave verification out"),
        ("on_nonfinite={skip: {}}", "train.on_nonfinite.skip", "is not kept; use fail"),
    ],
)
def test_what_does_not_go_with_an_inner_optimizer_that_remembers_is_refused(
    make_dataset: MakeDataset, optimizer: str, setting: str, field: str, says: str
) -> None:
    settings = (f"train.optimizer={optimizer}", f"train.{setting}")
    path = field or f"train.optimizer.{INNER[optimizer]}"
    found = complaints(make_dataset(), LOCAL, *settings)
    assert list(found) == [path]
    assert says in found[path]
    assert not complaints(make_dataset(), "train.synchronous={}", *settings)
    assert not complaints(make_dataset(), LOCAL, f"train.{setting}")


@pytest.mark.parametrize(
    "setting",
    [
        "reduction={median: {}}",
        "reduction={clip_norm: 1}",
        "compression={int8: {}, down_cast_to: bfloat16}",
        "compression={top_k: {fraction: 0.01}}",
        "optimizer.clip_norm=1",
    ],
)
def test_what_goes_with_an_inner_optimizer_that_remembers(
    make_dataset: MakeDataset, setting: str
) -> None:
    assert not complaints(make_dataset(), LOCAL, "train.optimizer={adam: {}}", f"train.{setting}")


@pytest.mark.parametrize("optimizer", [*INNER, "{sgd: {}}"])
def test_the_vectors_of_an_inner_optimizer_are_those_that_its_rule_names(
    make_dataset: MakeDataset, optimizer: str
) -> None:
    resolved = specs.prepare(edited(LOCAL, f"train.optimizer={optimizer}"), make_dataset())
    names = build_local_optimizer(resolved.train, 10).state_names
    assert inner_vectors(resolved.train) == len(names)
    assert unit_span(resolved) == (1 if names else 0)
    synchronous = edited("train.synchronous={}", f"train.optimizer={optimizer}")
    assert inner_vectors(specs.prepare(synchronous, make_dataset()).train) == 0


@pytest.mark.parametrize(
    ("settings", "every"),
    [
        (["train.compression={int8: {}}"], 0),
        (["train.compression={sign: {}}", "train.checkpoints={every_steps: 20}"], 20),
        (["train.compression={sign: {}}", "train.checkpoints={every_steps: 100}"], 25),
        (["train.compression={sign: {}}", "train.checkpoints={every_steps: 7}"], 32),
        (["train.compression={sign: {}}", "train.checkpoints={every_steps: 101}"], 32),
        (["train.compression={sign: {}}", "train.stale={bound: 0}"], 32),
        (["train.compression={top_k: {fraction: 1}}", "train.local={steps: 4}"], 32),
        (["train.local={steps: 1}", MOMENTUM], 32),
        (["train.local={steps: 4}", MOMENTUM], 8),
        (["train.local={steps: 4}", MOMENTUM, "train.checkpoints={every_steps: 10}"], 5),
        (["train.local={steps: 20}", MOMENTUM, "train.checkpoints={every_steps: 10}"], 1),
        (["train.local={steps: 500}", MOMENTUM, "train.compression={sign: {}}"], 1),
    ],
)
def test_states_are_handed_in_where_checkpoints_are_taken(
    make_dataset: MakeDataset, settings: list[str], every: int
) -> None:
    dataset = make_dataset()
    resolved = specs.prepare(edited(*settings), dataset)
    assert specs.job_plan(resolved, dataset, "job-1").state_every == every


@pytest.mark.parametrize(
    ("settings", "vectors"),
    [
        (["train.compression={sign: {}}"], 8),
        ([LOCAL, MOMENTUM], 16),
        ([LOCAL, "train.optimizer={adam: {}}"], 2 * 16),
        ([LOCAL, "train.optimizer={adam: {}}", "train.compression={sign: {}}"], 2 * 16 + 8),
        ([LOCAL, MOMENTUM, "resources.min_workers=4"], 4),
    ],
)
def test_the_memory_of_a_worker_counts_the_states_of_its_nodes(
    make_dataset: MakeDataset, settings: list[str], vectors: int
) -> None:
    """16 shards: 8 nodes of two with a lossy compressor, 16 of one without."""
    big = "train.model={mlp: {hidden: [100000]}}"
    parameters = (784 * 100_000 + 100_000 + 100_000 * 10 + 10) * 4
    resolved = specs.prepare(edited(big, *settings), make_dataset())
    without = JobSpec.FromString(resolved.SerializeToString())
    without.train.ClearField("compression")
    without.train.optimizer.sgd.momentum = 0
    nodes = -(-16 // unit_span(resolved) // max(1, resolved.resources.min_workers))
    more = worker_bytes(resolved, make_dataset()) - worker_bytes(without, make_dataset())
    # The present state and the next one, the version at which states are made again, and the
    # contributions of nodes, each of which travels by itself.
    assert round(more / parameters, 2) == 2 * vectors + 1 + nodes - 1
