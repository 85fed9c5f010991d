"""Buffers: no gradient comes for them; the next version is the mean of what they become."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.aggregation.core.state import RangeParameters
from phalanx.errors import InvalidArgument
from phalanx.models import DataSchema, Model, build_model
from phalanx.models.base import buffer_mask, decay_mask, frame_masks, make_layout, views
from phalanx.optimizers import Late, build_contribution_optimizer, build_optimizer
from phalanx.specs import load_yaml
from phalanx.testing.datasets import StoredDataset, classification, store
from phalanx.testing.plans import plan_for
from phalanx.testing.running_model import RUNNING_MODEL
from phalanx.training.leaf import leaf_batch
from phalanx.training.local import TrainedModel, train_in_process
from phalanx.v1.job_spec_pb2 import JobSpec, Train
from phalanx.v1.training_pb2 import JobPlan, ParameterRange

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"sgd": {"learning_rate": 0.1}},
    "momentum": {"sgd": {"learning_rate": 0.1, "momentum": 0.9}},
    "adagrad": {"adagrad": {"learning_rate": 0.1}},
    "adam": {"adam": {"learning_rate": 0.01}},
    "adamw": {"adamw": {"learning_rate": 0.01, "weight_decay": 0.1}},
}
STEPS = 6
SHARDS = 3


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> StoredDataset:
    """449 rows for training: the shards' last leaves of an epoch are of different sizes."""
    features, targets = classification(561, 6, 3)
    return store(tmp_path_factory.mktemp("blobs"), features, targets, test=0.2, chunk_bytes=4096)


@pytest.fixture
def code(tmp_path: Path) -> Path:
    (tmp_path / "running.py").write_text(RUNNING_MODEL)
    return tmp_path


def plan(dataset: StoredDataset, **train: Any) -> JobPlan:
    document = {
        "model": {"custom": {"entrypoint": "running:Running"}},
        "optimizer": OPTIMIZERS["momentum"],
        "batch_size": 60 * SHARDS,
        "stop": {"steps": STEPS},
        "l2": 0.01,
        "dtype": "float64",
        **train,
    }
    return plan_for(dataset, document, data={"name": "data", "shards": SHARDS}, seed=3)


def run(dataset: StoredDataset, job: JobPlan, code: Path) -> TrainedModel:
    return train_in_process(job, dataset.manifest, dataset.fetch, code_dir=code)


def model_of(job: JobPlan, code: Path) -> Model:
    return build_model(JobSpec.FromString(job.spec), DataSchema(6, 3, "float64"), code)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_sets_buffers_to_the_mean_and_all_else_as_without_them(name: str) -> None:
    train = plan_train(OPTIMIZERS[name])
    random = np.random.default_rng(1)
    w = random.normal(size=(STEPS + 1, 9))
    buffers, decay = np.arange(9) >= 6, np.arange(9) < 4
    with_buffers, without = build_optimizer(train, STEPS), build_optimizer(train, STEPS)
    state = {each: np.zeros(9) for each in with_buffers.state_names}
    bare = {each: np.zeros(6) for each in without.state_names}
    for step in range(STEPS):
        total = random.normal(size=9)
        out, plain = np.empty(9), np.empty(6)
        with_buffers.apply(w[step], total, 7, decay, state, step, out, buffers=buffers)
        without.apply(w[step, :6], total[:6], 7, decay[:6], bare, step, plain)
        np.testing.assert_array_equal(out[:6], plain)
        np.testing.assert_array_equal(out[6:], total[6:] / 7)
    assert all(not vector[6:].any() for vector in state.values())


def plan_train(optimizer: dict[str, Any], **more: Any) -> Train:
    from google.protobuf.json_format import ParseDict

    return ParseDict({"optimizer": optimizer, "l2": 0.01, **more}, Train())


def test_a_late_contribution_sets_buffers_without_any_correction() -> None:
    asynchronous = {"delayCompensated": {"strength": 2.0}}
    train = plan_train(OPTIMIZERS["sgd"], asynchronous=asynchronous)
    optimizer = build_contribution_optimizer(train, STEPS)
    now, read, total = np.ones(4), np.zeros(4), np.array([1.0, 2.0, 3.0, 4.0])
    state = {name: np.zeros(4) for name in optimizer.state_names}
    out, buffers = np.empty(4), np.array([False, False, True, True])
    optimizer.apply_late(now, total, 2, None, state, Late(1, 5, 3), read, out, buffers)
    np.testing.assert_array_equal(out[2:], [1.5, 2.0])
    alone = np.empty(4)
    state = {name: np.zeros(4) for name in optimizer.state_names}
    optimizer.apply_late(now, total, 2, None, state, Late(1, 5, 3), read, alone)
    np.testing.assert_array_equal(out[:2], alone[:2])
    assert (alone[2:] != out[2:]).all()


@given(
    sizes=st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=6),
    data=st.data(),
)
@settings(deadline=None, max_examples=60)
def test_masks_of_ranges_and_frames_are_cuts_of_that_of_the_whole(
    sizes: list[tuple[int, bool]], data: st.DataObject
) -> None:
    tensors = [(f"t{index}", (size,), not marked) for index, (size, marked) in enumerate(sizes)]
    names = {name for (name, _, _), (_, marked) in zip(tensors, sizes, strict=True) if marked}
    layout = make_layout(tensors, "float32", buffers=names)
    whole = np.repeat([marked for _, marked in sizes], [size for size, _ in sizes])
    first = data.draw(st.integers(0, layout.element_count - 1))
    count = data.draw(st.integers(1, layout.element_count - first))
    for mask, expected in ((buffer_mask, whole), (decay_mask, ~whole)):
        part, cut = mask(layout, first, count), expected[first : first + count]
        assert (part is None) == (not cut.any())
        half = count // 2
        grid = [(0, half), (half, count - half)] if half else [(0, count)]
        for frame, (start, length) in zip(frame_masks(part, grid), grid, strict=True):
            wanted = cut[start : start + length]
            np.testing.assert_array_equal(np.zeros(length) if frame is None else frame, wanted)


def test_a_range_in_the_middle_of_a_buffer_has_the_bits_of_the_whole() -> None:
    layout = make_layout([("w", (700,), True), ("b", (500,), False)], "float64", buffers={"b"})
    train = plan_train(OPTIMIZERS["momentum"])
    random = np.random.default_rng(2)
    w, total = random.normal(size=1200), random.normal(size=1200)
    optimizer = build_optimizer(train, STEPS)
    whole = np.empty(1200)
    state = {name: np.zeros(1200) for name in optimizer.state_names}
    optimizer.apply(w, total, 9, decay_mask(layout), state, 0, whole, buffers=buffer_mask(layout))
    for first, count in ((0, 650), (650, 150), (800, 400)):
        piece = ParameterRange(index=0, first_element=first, element_count=count)
        owned = RangeParameters(1, piece, layout, build_optimizer(train, STEPS))
        part = slice(first, first + count)
        owned.load(0, w[part], {name: np.zeros(count) for name in optimizer.state_names})
        np.testing.assert_array_equal(owned.apply(0, 0, total[part], 9), whole[part])


def test_a_range_applies_late_contributions_alike() -> None:
    layout = make_layout([("w", (5,), True), ("b", (4,), False)], "float64", buffers={"b"})
    train = plan_train(OPTIMIZERS["sgd"], asynchronous={"delayCompensated": {"strength": 2.0}})
    random = np.random.default_rng(4)
    w, read, total = random.normal(size=(3, 9))
    optimizer = build_contribution_optimizer(train, STEPS)
    state = {name: np.zeros(9) for name in optimizer.state_names}
    piece = ParameterRange(index=0, first_element=0, element_count=9)
    owned = RangeParameters(1, piece, layout, build_contribution_optimizer(train, STEPS))
    owned.load(0, w, state)
    out, late = np.empty(9), Late(0, 0, 0)
    masks = decay_mask(layout), buffer_mask(layout)
    optimizer.apply_late(w, total, 3, masks[0], state, late, read, out, masks[1])
    np.testing.assert_array_equal(owned.apply_late(0, 0, total, 3, late, read), out)
    np.testing.assert_array_equal(out[5:], total[5:] / 3)


def longhand(dataset: StoredDataset, job: JobPlan, code: Path, trained: TrainedModel) -> Any:
    """The running mean of a synchronous job, from the rows of its leaves alone."""
    reader = dataset.reader("train", np.float64)
    mean = np.zeros(6)
    for step in range(trained.steps):
        batches = [leaf_batch(reader, job, shard, step) for shard in range(job.shards)]
        there = [batch for batch in batches if batch is not None]
        new = [0.9 * mean + 0.1 * batch.features.mean(axis=0) for batch in there]
        mean = np.average(new, axis=0, weights=[batch.rows for batch in there])
    return mean


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_next_version_is_the_mean_over_the_examples(
    dataset: StoredDataset, code: Path, optimizer: str
) -> None:
    job = plan(dataset, optimizer=OPTIMIZERS[optimizer])
    trained = run(dataset, job, code)
    mean = views(trained.layout, trained.parameters)["mean"]
    expected = longhand(dataset, job, code, trained)
    np.testing.assert_allclose(mean, expected, rtol=0, atol=1e-12)
    assert np.abs(mean).max() > 0.01


def test_shards_carry_buffers_through_their_own_steps(dataset: StoredDataset, code: Path) -> None:
    outer = {"sgd": {"learning_rate": 0.7, "momentum": 0.9, "nesterov": True}}
    job = plan(dataset, optimizer=OPTIMIZERS["adam"], local={"steps": 2, "outer": outer})
    trained = run(dataset, job, code)
    reader = dataset.reader("train", np.float64)
    mean = np.zeros(6)
    for version in range(STEPS):
        ends, rows = [], []
        for shard in range(SHARDS):
            own, count = mean, 0
            for step in (2 * version, 2 * version + 1):
                batch = leaf_batch(reader, job, shard, step)
                if batch is not None:
                    own = 0.9 * own + 0.1 * batch.features.mean(axis=0)
                    count += batch.rows
            ends.append(own)
            rows.append(count)
        mean = np.average(ends, axis=0, weights=rows)
    found = views(trained.layout, trained.parameters)["mean"]
    np.testing.assert_allclose(found, mean, rtol=0, atol=1e-12)


@pytest.mark.parametrize("staleness", ["plain", "scaled", "delay_compensated"])
def test_each_contribution_that_commits_alone_sets_them(
    dataset: StoredDataset, code: Path, staleness: str
) -> None:
    job = plan(dataset, asynchronous={staleness: {}}, optimizer=OPTIMIZERS["sgd"])
    trained = run(dataset, job, code)
    reader = dataset.reader("train", np.float64)
    mean = np.zeros(6)
    for step in range(STEPS):
        for shard in range(SHARDS):
            batch = leaf_batch(reader, job, shard, step)
            if batch is not None:
                mean = 0.9 * mean + 0.1 * batch.features.mean(axis=0)
    found = views(trained.layout, trained.parameters)["mean"]
    np.testing.assert_allclose(found, mean, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["median", "trimmed_mean"])
def test_rules_that_compare_element_by_element_take_buffers(
    dataset: StoredDataset, code: Path, kind: str
) -> None:
    reduction = {kind: {"trim": 1} if kind == "trimmed_mean" else {}}
    job = plan(dataset, reduction=reduction, stop={"steps": 1})
    trained = run(dataset, job, code)
    reader = dataset.reader("train", np.float64)
    batches = [leaf_batch(reader, job, shard, 0) for shard in range(SHARDS)]
    new = [0.1 * batch.features.mean(axis=0) for batch in batches if batch is not None]
    found = views(trained.layout, trained.parameters)["mean"]
    np.testing.assert_allclose(found, np.median(new, axis=0), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("train", "field"),
    [
        ({"optimizer": {"sgd": {}, "clip_norm": 1.0}}, "train.optimizer.clip_norm"),
        ({"local": {"steps": 2, "outer": {"clip_norm": 1.0}}}, "train.local.outer.clip_norm"),
        ({"reduction": {"clip_norm": 1.0}}, "train.reduction.clip_norm"),
        ({"reduction": {"krum": {"faulty": 0}}}, "train.reduction.krum"),
        ({"compression": {"cast_to": "bfloat16"}}, "train.compression.cast_to"),
        ({"compression": {"int8": {}}}, "train.compression.int8"),
        ({"compression": {"top_k": {"fraction": 0.1}}}, "train.compression.top_k"),
        ({"compression": {"sign": {}}}, "train.compression.sign"),
    ],
)
def test_what_would_mix_buffers_with_gradients_is_refused(
    dataset: StoredDataset, code: Path, train: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidArgument, match="'mean': leave it out, or build") as caught:
        model_of(plan(dataset, **train), code)
    assert caught.value.reason == "NOT_WITH_BUFFERS"
    assert [each.field for each in caught.value.violations] == [field]


def test_privacy_is_refused_too(code: Path) -> None:
    spec = load_yaml(
        "name: job\ndata: {name: data}\ntrain: {model: {custom: {entrypoint: 'running:Running'}}, "
        "privacy: {clip_norm: 1, noise_multiplier: 1, delta: 1e-5}}"
    )
    with pytest.raises(InvalidArgument, match=r"train\.privacy"):
        build_model(spec, DataSchema(6, 3), code)


def test_versions_on_their_way_to_workers_may_be_shorter(
    dataset: StoredDataset, code: Path
) -> None:
    trained = run(dataset, plan(dataset, compression={"down_cast_to": "bfloat16"}), code)
    exact = run(dataset, plan(dataset), code)
    one, other = (views(each.layout, each.parameters)["mean"] for each in (trained, exact))
    np.testing.assert_allclose(one, other, rtol=0.02, atol=1e-3)
