"""Rows dealt out by class: every stretch has its share, and nothing is lost or taken twice."""

from __future__ import annotations

import itertools
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.errors import DataLoss, InvalidArgument
from phalanx.testing.datasets import StoredDataset, sparse_classification, store
from phalanx.testing.plans import plan_for
from phalanx.training.classes import ClassLayout, apportioned
from phalanx.training.leaf import leaf_batch, leaf_chunks
from phalanx.training.sampler import RowSelection, rows_for_leaf, rows_in_order, shard_rows

class_sizes = st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any)
chunk_classes = st.integers(1, 5).flatmap(
    lambda classes: st.lists(
        st.lists(st.integers(0, 30), min_size=classes, max_size=classes), min_size=1, max_size=6
    ).filter(lambda chunks: any(map(any, chunks)))
)


@given(sizes=class_sizes)
def test_the_even_order_is_that_of_the_places(sizes: list[int]) -> None:
    places = sorted(
        (Fraction(2 * row + 1, 2 * size), label)
        for label, size in enumerate(sizes)
        for row in range(size)
    )
    counts = [0] * len(sizes)
    for total in range(sum(sizes) + 1):
        assert apportioned(tuple(sizes), total) == tuple(counts)
        if total < len(places):
            counts[places[total][1]] += 1


def test_a_thousand_small_classes_and_a_large_one() -> None:
    """Here the first guess of the apportionment is far off, to both sides."""
    for small in (1, 3):
        sizes = (100_000, *[small] * 1000)
        for total in (1, 51_500, sum(sizes) - 1, sum(sizes)):
            found = apportioned(sizes, total)
            assert sum(found) == total
            assert all(0 <= rows <= size for rows, size in zip(found, sizes, strict=True))
    assert apportioned((100_000, *[1] * 1000), 101_000) == (100_000, *[1] * 1000)


def rows_of(selections: list[RowSelection]) -> Counter[tuple[int, int | None, int]]:
    return Counter(
        (each.chunk_index, each.label, int(row)) for each in selections for row in each.rows
    )


@given(chunks=chunk_classes, rows_per_leaf=st.integers(1, 40), data=st.data())
@settings(max_examples=60, deadline=None)
def test_an_epoch_of_stratified_shards_uses_every_row_once(
    chunks: list[list[int]], rows_per_leaf: int, data: st.DataObject
) -> None:
    layout = ClassLayout(chunks, oversample=False)
    rows = sum(map(sum, chunks))
    assert layout.rows == rows
    shards = data.draw(st.integers(1, min(rows, 5)))
    seen: Counter[tuple[int, int | None, int]] = Counter()
    for shard in range(shards):
        part = shard_rows(shard, shards, [sum(chunk) for chunk in chunks], layout)
        largest = -(-rows // shards)
        for step in range(-(-largest // rows_per_leaf)):
            selections = rows_for_leaf(part, 7, 2, step, rows_per_leaf)
            assert sum(len(each.rows) for each in selections) <= rows_per_leaf
            seen += rows_of(selections)
    assert seen == Counter(
        (index, label, row)
        for index, chunk in enumerate(chunks)
        for label, count in enumerate(chunk)
        for row in range(count)
    )


@given(chunks=chunk_classes, data=st.data())
@settings(max_examples=60, deadline=None)
def test_every_shard_has_its_share_of_each_class(
    chunks: list[list[int]], data: st.DataObject
) -> None:
    layout = ClassLayout(chunks, oversample=False)
    sizes = np.sum(chunks, axis=0)
    shards = data.draw(st.integers(1, min(layout.rows, 7)))
    for shard in range(shards):
        part = shard_rows(shard, shards, [sum(chunk) for chunk in chunks], layout)
        counts = np.zeros(len(sizes))
        for each in rows_in_order(part):
            counts[each.label] += len(each.rows)
        share = sizes * (part.stop - part.first) / layout.rows
        assert np.abs(counts - share).max() <= 1 + len(sizes) / 2


def test_oversampling_makes_all_classes_as_long_as_the_longest() -> None:
    chunks = [[40, 3, 0], [20, 4, 0]]
    layout = ClassLayout(chunks, oversample=True)
    assert layout.rows == 120
    seen: Counter[tuple[int, int | None, int]] = Counter()
    for shard in range(4):
        part = shard_rows(shard, 4, [43, 24], layout)
        selections = [each for step in range(3) for each in rows_for_leaf(part, 1, 0, step, 10)]
        labels = Counter(each.label for each in selections for _ in each.rows)
        assert labels == {0: 15, 1: 15}
        seen += rows_of(selections)
    large = [count for (_, label, _), count in seen.items() if label == 0]
    small = [count for (_, label, _), count in seen.items() if label == 1]
    assert (len(large), set(large)) == (60, {1})
    assert (len(small), sum(small), set(small)) == (7, 60, {8, 9})


def sorted_by_class(folder: Path, **options: Any) -> tuple[StoredDataset, Any, Any]:
    targets = np.repeat([0, 1, 2], [300, 90, 30])
    features = np.arange(420, dtype=np.float32).reshape(420, 1) @ np.ones((1, 4), np.float32)
    return store(folder, features, targets, chunk_bytes=2048, **options), features, targets


def plan_of(stored: StoredDataset, data: dict[str, Any], **train: Any) -> Any:
    model = {"softmax_regression": {}, "standardise": False}
    return plan_for(
        stored, {"model": model, "batch_size": 84, **train}, data={"name": "data", **data}
    )


def test_leaves_of_a_set_sorted_by_class(tmp_path: Path) -> None:
    """As stored, most shards would have rows of one class only."""
    stored, features, targets = sorted_by_class(tmp_path)
    plan = plan_of(stored, {"shards": 4, "rows": {"stratified": True}})
    reader = stored.reader()
    assert len(reader.chunks) > 4
    seen = []
    for shard, step in itertools.product(range(4), range(plan.steps_per_epoch)):
        batch = leaf_batch(reader, plan, shard, step)
        if batch is None:
            continue
        rows = batch.features[:, 0].astype(int)
        np.testing.assert_array_equal(batch.features, features[rows])
        np.testing.assert_array_equal(batch.targets, targets[rows])
        touched = leaf_chunks(plan, reader, shard, step)
        starts = np.cumsum([0, *reader.chunk_rows])
        assert set(np.searchsorted(starts, rows, side="right") - 1) <= set(touched)
        seen.append(rows)
    assert sorted(np.concatenate(seen)) == list(range(420))
    for shard in range(4):
        mine = targets[np.concatenate(seen[shard * plan.steps_per_epoch :][: plan.steps_per_epoch])]
        assert np.abs(np.bincount(mine) - [75, 22.5, 7.5]).max() <= 1


def test_sparse_rows_by_class(tmp_path: Path) -> None:
    features, targets = sparse_classification(200, 30)
    stored = store(tmp_path, features, targets, chunk_bytes=2048)
    plan = plan_of(stored, {"shards": 2, "rows": {"stratified": True}}, batch_size=0)
    reader, found = stored.reader(), []
    for shard in range(2):
        batch = leaf_batch(reader, plan, shard, 0)
        assert batch is not None
        found += [
            (*row, target)
            for row, target in zip(batch.features.toarray(), batch.targets, strict=True)
        ]
    expected = [(*row, target) for row, target in zip(features.toarray(), targets, strict=True)]
    assert sorted(found) == sorted(expected)


def test_a_chunk_that_has_other_classes_than_the_manifest_says(tmp_path: Path) -> None:
    stored, _, _ = sorted_by_class(tmp_path)
    reader = stored.reader()
    selection = RowSelection(0, np.array([reader.chunks[0].class_rows[0]]), label=0)
    with pytest.raises(InvalidArgument, match="of class 0"):
        reader.rows([selection])
    first, *others = reader.chunks
    wrong = type(first)(first.digest, first.rows, first.size_bytes, 0, (1, first.rows - 1, 0))
    reader.close()
    reader.chunks = (wrong, *others)
    with pytest.raises(DataLoss, match="add the data set again"):
        reader.rows([RowSelection(0, np.array([0]), label=0)])


def test_rows_carry_the_weight_of_their_class(tmp_path: Path) -> None:
    stored, _, targets = sorted_by_class(tmp_path)
    plan = plan_of(stored, {"shards": 3, "class_weights": {}}, batch_size=0)
    totals = np.zeros(3)
    for shard in range(3):
        batch = leaf_batch(stored.reader(), plan, shard, 0)
        assert batch is not None
        assert batch.weights is not None
        assert batch.weights.dtype == np.float32
        totals += np.bincount(batch.targets, batch.weights, minlength=3)
    np.testing.assert_allclose(totals, len(targets) / 3, rtol=1e-6)
