"""Rows out of chunks: any rows, in any order, as a leaf wants them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given
from hypothesis import strategies as st

from phalanx.data.reader import ChunkReader
from phalanx.errors import DataLoss, InvalidArgument
from phalanx.testing import datasets
from phalanx.testing.properties import examples
from phalanx.training.sampler import RowSelection

SMALL = {"chunk_bytes": 1024}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> datasets.StoredDataset:
    features, targets = datasets.classification(rows=300)
    return datasets.store(tmp_path_factory.mktemp("dense"), features, targets, **SMALL)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> datasets.StoredDataset:
    features, targets = datasets.sparse_classification(rows=300)
    return datasets.store(tmp_path_factory.mktemp("sparse"), features, targets, **SMALL)


def global_rows(reader: ChunkReader, selections: list[RowSelection]) -> list[int]:
    starts = np.concatenate([[0], np.cumsum(reader.chunk_rows)])
    return [int(starts[one.chunk_index] + row) for one in selections for row in one.rows]


def draw_selections(data: st.DataObject, reader: ChunkReader) -> list[RowSelection]:
    selections = []
    for _ in range(data.draw(st.integers(0, 4))):
        index = data.draw(st.integers(0, len(reader.chunks) - 1))
        last = reader.chunk_rows[index] - 1
        rows = data.draw(st.lists(st.integers(0, last), max_size=30))
        if data.draw(st.booleans()):
            rows = sorted(set(rows))
        selections.append(RowSelection(index, np.array(rows, dtype=np.int64)))
    return selections


@examples(50)
@given(data=st.data())
def test_any_rows_in_any_order(
    data: st.DataObject, dense: datasets.StoredDataset, sparse: datasets.StoredDataset
) -> None:
    features, targets = datasets.classification(rows=300)
    reader = dense.reader()
    assert len(reader.chunks) > 5
    selections = draw_selections(data, reader)
    wanted = global_rows(reader, selections)
    batch = reader.rows(selections)
    assert batch.features.tolist() == features[wanted].tolist()
    assert batch.targets.tolist() == targets[wanted].tolist()

    sparse_features, sparse_targets = datasets.sparse_classification(rows=300)
    reader = sparse.reader()
    assert len(reader.chunks) > 5
    selections = draw_selections(data, reader)
    wanted = global_rows(reader, selections)
    batch = reader.rows(selections)
    assert scipy.sparse.issparse(batch.features)
    assert batch.features.toarray().tolist() == sparse_features.toarray()[wanted].tolist()
    assert batch.targets.tolist() == sparse_targets[wanted].tolist()
    assert batch.features.indices.dtype == batch.features.indptr.dtype == np.int32


def whole(reader: ChunkReader) -> list[RowSelection]:
    return [RowSelection(index, np.arange(rows)) for index, rows in enumerate(reader.chunk_rows)]


@pytest.mark.parametrize("rows", [[0, 2, 1, 3], [3, 2, 1, 0], [0, 0, 2, 3], [2, 3, 4, 5]])
def test_rows_that_only_begin_and_end_like_neighbours(
    dense: datasets.StoredDataset, sparse: datasets.StoredDataset, rows: list[int]
) -> None:
    features, targets = datasets.classification(rows=300)
    batch = dense.reader().rows([RowSelection(0, np.array(rows))])
    assert batch.features.tolist() == features[rows].tolist()
    assert batch.targets.tolist() == targets[rows].tolist()
    sparse_features, sparse_targets = datasets.sparse_classification(rows=300)
    batch = sparse.reader().rows([RowSelection(0, np.array(rows))])
    assert scipy.sparse.issparse(batch.features)
    assert batch.features.toarray().tolist() == sparse_features.toarray()[rows].tolist()
    assert batch.targets.tolist() == sparse_targets[rows].tolist()


def test_features_come_in_the_wanted_type_and_aligned(dense: datasets.StoredDataset) -> None:
    for dtype in ("float32", "float64"):
        batch = dense.reader(dtype=dtype).rows(whole(dense.reader()))
        assert batch.features.dtype == dtype
        assert batch.targets.dtype == np.int64
        assert batch.features.ctypes.data % 64 == 0
        assert batch.features.flags.c_contiguous
        assert batch.features.flags.writeable


def test_bytes_become_floats(tmp_path: Path) -> None:
    images = np.arange(64, dtype=np.uint8).reshape(8, 8)
    stored = datasets.store(tmp_path, images, np.arange(8) % 2)
    assert stored.manifest.dtype == "uint8"
    batch = stored.reader().rows([RowSelection(0, np.array([7, 0]))])
    assert batch.features.dtype == np.float32
    assert batch.features[0].tolist() == list(range(56, 64))


def test_targets_of_a_regression_come_in_the_wanted_type(tmp_path: Path) -> None:
    features, targets = datasets.regression(rows=20)
    stored = datasets.store(tmp_path, features, targets)
    exact = stored.reader(dtype=np.float64).rows(whole(stored.reader()))
    assert exact.targets.tolist() == targets.tolist()
    assert stored.reader().rows(whole(stored.reader())).targets.dtype == np.float32


def test_a_bounded_number_of_chunks_stays_open(dense: datasets.StoredDataset) -> None:
    fetched: list[str] = []

    def fetch(digest: str) -> Path:
        fetched.append(digest)
        return dense.blobs.path(digest)

    two = 2 * dense.manifest.splits["train"][0].size_bytes
    reader = ChunkReader(dense.manifest, "train", fetch, open_bytes=two)
    row = np.array([0])
    order = [0, 1, 0, 2, 0, 1]
    for index in order:
        reader.rows([RowSelection(index, row)])
    digests = [chunk.digest for chunk in reader.chunks]
    assert fetched == [digests[0], digests[1], digests[2], digests[1]]
    reader.close()
    reader.rows([RowSelection(0, row)])
    assert fetched[-1] == digests[0]


def test_more_chunks_in_one_call_than_may_stay_open(dense: datasets.StoredDataset) -> None:
    reader = ChunkReader(dense.manifest, "train", dense.fetch, open_bytes=1)
    batch = reader.rows(whole(reader))
    assert batch.features.tolist() == datasets.classification(rows=300)[0].tolist()


@pytest.mark.parametrize(
    ("chunk", "rows", "message"),
    [
        (99, [0], r"none with index 99"),
        (-1, [0], r"none with index -1"),
        (0, [0, 10_000], r"chunk 0 of split 'train' has rows 0 to \d+, asked for 0 to 10000"),
        (0, [-1], r"asked for -1 to -1"),
    ],
)
def test_rows_that_do_not_exist_are_refused(
    dense: datasets.StoredDataset, chunk: int, rows: list[int], message: str
) -> None:
    with pytest.raises(InvalidArgument, match=message):
        dense.reader().rows([RowSelection(chunk, np.array(rows))])


def test_an_unknown_split_is_refused(dense: datasets.StoredDataset) -> None:
    with pytest.raises(InvalidArgument, match="no split 'test'; it has train"):
        dense.reader("test")


def test_a_file_that_is_another_chunk_is_told(
    dense: datasets.StoredDataset, sparse: datasets.StoredDataset
) -> None:
    row: Any = [RowSelection(0, np.array([0]))]
    other = sparse.manifest.splits["train"][0].digest
    reader = ChunkReader(dense.manifest, "train", lambda _: sparse.blobs.path(other))
    with pytest.raises(DataLoss, match="is not the dense chunk of"):
        reader.rows(row)
