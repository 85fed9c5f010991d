"""Some columns of a data set: which features they are, and rows that have these alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given
from hypothesis import strategies as st

from phalanx.data import picking
from phalanx.data.choice import RawColumns, choose, merged
from phalanx.data.ingest import ingest
from phalanx.data.manifest import DatasetManifest, Statistics
from phalanx.data.options import IngestOptions
from phalanx.data.picking import FeaturePicker
from phalanx.data.reader import ChunkReader
from phalanx.data.writer import DirectoryBlobs
from phalanx.errors import DataLoss, InvalidArgument
from phalanx.testing import datasets
from phalanx.testing.properties import examples
from phalanx.training.sampler import RowSelection

PEOPLE = """age,job,hours,town,income
39,clerk,40,Ulm,low
50,smith,13,Bonn,high
38,clerk,11,Ulm,low
53,baker,40,Jena,low
28,smith,40,Bonn,high
"""
WIDTH = 9


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> datasets.StoredDataset:
    folder = tmp_path_factory.mktemp("people")
    (folder / "people.csv").write_text(PEOPLE)
    blobs = DirectoryBlobs(folder / "blobs")
    return datasets.StoredDataset(ingest(folder / "people.csv", IngestOptions(), blobs), blobs)


@pytest.fixture(scope="module")
def bytes_(tmp_path_factory: pytest.TempPathFactory) -> datasets.StoredDataset:
    pixels = np.random.default_rng(3).integers(0, 256, (90, WIDTH)).astype(np.uint8)
    return datasets.store(tmp_path_factory.mktemp("bytes"), pixels, np.arange(90) % 3)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> datasets.StoredDataset:
    data = datasets.sparse_classification(rows=120, features=WIDTH, density=0.3)
    return datasets.store(tmp_path_factory.mktemp("sparse"), *data, chunk_bytes=1024)


def whole(reader: ChunkReader) -> list[RowSelection]:
    return [RowSelection(index, np.arange(rows)) for index, rows in enumerate(reader.chunk_rows)]


def gathered(stored: datasets.StoredDataset, *columns: str, **options: Any) -> Any:
    reader = ChunkReader(stored.manifest, "train", stored.fetch, columns=columns, **options)
    return reader.rows(whole(reader)).features


def test_a_column_of_categories_is_all_of_its_features(people: datasets.StoredDataset) -> None:
    choice = choose(people.manifest, ["town", "job"])
    assert choice.runs == (range(1, 4), range(5, 8))
    names = ("job=baker", "job=clerk", "job=smith", "town=Bonn", "town=Jena", "town=Ulm")
    assert choice.manifest.feature_names() == names
    assert choice.manifest.features == 6
    rows = gathered(people, "town", "job")
    assert rows.tolist() == gathered(people)[:, [1, 2, 3, 5, 6, 7]].tolist()
    assert rows[0].tolist() == [0, 1, 0, 0, 0, 1]


def test_statistics_are_those_of_the_data_set(people: datasets.StoredDataset) -> None:
    statistics, all_of_them = (
        choose(people.manifest, names).manifest.statistics for names in (["hours", "age"], [])
    )
    assert statistics.count == all_of_them.count == 5
    for name in ("mean", "std", "minimum", "maximum"):
        every = getattr(all_of_them, name)
        assert getattr(statistics, name) == (every[0], every[4])


def test_without_statistics_there_are_none(people: datasets.StoredDataset) -> None:
    wide = replace(people.manifest, statistics=Statistics(5))
    assert choose(wide, ["age"]).manifest.statistics == Statistics(5)


def test_all_columns_are_the_data_set_itself(people: datasets.StoredDataset) -> None:
    names = [column.name for column in people.manifest.columns]
    for chosen in ([], names, names[::-1]):
        assert choose(people.manifest, chosen).manifest is people.manifest


def test_columns_without_names_get_them_from_their_places(
    bytes_: datasets.StoredDataset,
) -> None:
    choice = choose(bytes_.manifest, ["x9", "x2", "x3"])
    assert choice.runs == (range(1, 3), range(8, 9))
    assert choice.manifest.feature_names() == ("x2", "x3", "x9")


def test_what_the_data_set_has_not_cannot_be_chosen(people: datasets.StoredDataset) -> None:
    with pytest.raises(InvalidArgument, match="no column 'income'"):
        choose(people.manifest, ["age", "income"])


def test_millions_of_columns_are_not_listed() -> None:
    columns = RawColumns(50_000_000)
    assert columns.position("x50000000") == 49_999_999
    assert columns.position("x50000001") is None
    assert columns.column(7).name == "x8"


def test_ranges_that_touch_are_one() -> None:
    ranges = [range(2), range(2, 2), range(2, 3), range(5, 6), range(6, 9)]
    assert merged(ranges) == (range(3), range(5, 9))


def draw_rows(data: st.DataObject, count: int) -> slice | np.ndarray:
    if data.draw(st.booleans()):
        first, stop = sorted(data.draw(st.tuples(st.integers(0, count), st.integers(0, count))))
        return slice(first, stop)
    return np.array(data.draw(st.lists(st.integers(0, count - 1), max_size=20)), dtype=np.int64)


@examples(150)
@given(data=st.data())
def test_any_features_of_any_rows(data: st.DataObject) -> None:
    places = sorted(data.draw(st.sets(st.integers(0, WIDTH - 1), min_size=1)))
    picker = FeaturePicker(merged(range(place, place + 1) for place in places), WIDTH)
    stored = data.draw(st.sampled_from(["uint8", "float32", "float64"]))
    wanted = data.draw(st.sampled_from(["float32", "float64"]))
    source = np.random.default_rng(1).integers(0, 256, (30, WIDTH)).astype(stored)
    rows = draw_rows(data, 30)
    expected = source[rows][:, places].astype(wanted)
    out = np.full(expected.shape, np.nan, dtype=wanted)
    picker.dense(source, rows, out)
    assert out.tobytes() == expected.tobytes()


@pytest.mark.parametrize("table", [WIDTH, 0], ids=["table", "search"])
@examples(100)
@given(data=st.data())
def test_any_features_of_sparse_rows(table: int, data: st.DataObject) -> None:
    places = sorted(data.draw(st.sets(st.integers(0, WIDTH - 1), min_size=1)))
    rows = data.draw(st.lists(st.sets(st.integers(0, WIDTH - 1)), max_size=12))
    dense = np.zeros((len(rows), WIDTH), np.float32)
    for row, indices in enumerate(rows):
        dense[row, sorted(indices)] = row + 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(picking, "_TABLE_FEATURES", table)
        picker = FeaturePicker(merged(range(place, place + 1) for place in places), WIDTH)
        picked = picker.rows(scipy.sparse.csr_array(dense))
    assert picked.toarray().tolist() == dense[:, places].tolist()
    assert picked.has_sorted_indices
    assert picked.nnz == np.count_nonzero(dense[:, places])


@pytest.mark.parametrize("order", [[5, 3, 3, 0, 1], [0, 1, 2, 3], []], ids=["any", "run", "none"])
@pytest.mark.parametrize("names", [["x2"], ["x4", "x5", "x6"], ["x1", "x3", "x4", "x9"]])
@pytest.mark.parametrize("kind", ["bytes_", "sparse"])
def test_rows_are_those_of_a_data_set_that_has_these_columns_alone(
    request: pytest.FixtureRequest, kind: str, names: list[str], order: list[int]
) -> None:
    stored: datasets.StoredDataset = request.getfixturevalue(kind)
    reader = ChunkReader(stored.manifest, "train", stored.fetch, columns=names)
    other = len(reader.chunks) // 2
    selections = [RowSelection(other, np.array(order, np.int64)), RowSelection(0, np.arange(4))]
    batch, everything = reader.rows(selections), stored.reader().rows(selections)
    places = [int(name[1:]) - 1 for name in names]
    found, expected = batch.features, everything.features[:, places]
    if kind == "sparse":
        assert found.indices.dtype == found.indptr.dtype == np.int32
        assert found.nnz == expected.nnz
        found, expected = found.toarray(), expected.toarray()
    assert found.tobytes() == np.ascontiguousarray(expected).tobytes()
    assert found.dtype == np.float32
    assert batch.targets.tolist() == everything.targets.tolist()
    assert reader.manifest.features == len(names)


def test_chosen_rows_are_aligned_like_others(bytes_: datasets.StoredDataset) -> None:
    for columns in ([], ["x3"], ["x1", "x5"]):
        rows = gathered(bytes_, *columns, dtype=np.float64)
        assert rows.ctypes.data % 64 == 0
        assert rows.flags.c_contiguous


def test_chunks_of_another_width_are_found_out(bytes_: datasets.StoredDataset) -> None:
    manifest: DatasetManifest = replace(bytes_.manifest, features=WIDTH + 1)
    reader = ChunkReader(manifest, "train", bytes_.fetch, columns=["x1"])
    with pytest.raises(DataLoss, match="has 9 features, the manifest says 10"):
        reader.rows(whole(reader))


def test_a_reader_says_at_once_what_it_cannot_read(people: datasets.StoredDataset) -> None:
    with pytest.raises(InvalidArgument, match="no column 'shoe'"):
        gathered(people, "shoe")


def test_the_same_file_without_the_other_columns_has_the_same_rows(
    people: datasets.StoredDataset, tmp_path: Path
) -> None:
    path = tmp_path / "fewer.csv"
    lines = [line.split(",") for line in PEOPLE.splitlines()]
    path.write_text("\n".join(f"{age},{town},{income}" for age, _, _, town, income in lines))
    blobs = DirectoryBlobs(tmp_path / "blobs")
    fewer = datasets.StoredDataset(ingest(path, IngestOptions(), blobs), blobs)
    narrow = choose(people.manifest, ["age", "town"]).manifest
    assert narrow.columns == fewer.manifest.columns
    assert narrow.statistics == fewer.manifest.statistics
    assert gathered(people, "age", "town").tobytes() == gathered(fewer).tobytes()
