"""Parquet in: the types that columns have decide what they become."""

from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from phalanx.data.ingest import ingest, ingest_arrays
from phalanx.data.manifest import DatasetManifest
from phalanx.data.options import IngestOptions
from phalanx.data.reader import ChunkReader
from phalanx.data.writer import DirectoryBlobs
from phalanx.errors import PhalanxError
from phalanx.training.sampler import RowSelection

TABLE = pa.table(
    {
        "age": pa.array([39, 50, None, 53], pa.int16()),
        "job": pa.array(["clerk", None, "clerk", "baker"], pa.large_string()),
        "member": pa.array([True, False, True, None], pa.bool_()),
        "price": pa.array([Decimal("1.50"), Decimal("2.25"), Decimal(0), Decimal(-1)]),
        "city": pa.array(["a", "b", "a", "a"]).dictionary_encode(),
        "income": pa.array([" low", "high", "low ", "high"]),
    }
)


def add(folder: Path, table: pa.Table, name: str = "a.parquet", **options: Any) -> DatasetManifest:
    pyarrow.parquet.write_table(table, folder / name, row_group_size=3)
    return ingest(folder / name, IngestOptions(**options), DirectoryBlobs(folder / "blobs"))


def rows_of(folder: Path, manifest: DatasetManifest, split: str = "train") -> Any:
    reader = ChunkReader(manifest, split, DirectoryBlobs(folder / "blobs").path, dtype="float64")
    return reader.rows(
        [RowSelection(index, np.arange(rows)) for index, rows in enumerate(reader.chunk_rows)]
    )


def error_of(folder: Path, table: pa.Table, **options: Any) -> str:
    with pytest.raises(PhalanxError) as caught:
        add(folder, table, **options)
    return caught.value.message


def test_types_decide_and_text_is_trimmed(tmp_path: Path) -> None:
    manifest = add(tmp_path, TABLE, missing="category")
    assert manifest.feature_names() == (
        "age",
        *("job=baker", "job=clerk", "job is missing"),
        *("member", "price", "city=a", "city=b"),
    )
    assert manifest.classes == ("high", "low")
    batch = rows_of(tmp_path, manifest)
    mean_age, members = (39 + 50 + 53) / 3, 2 / 3
    np.testing.assert_allclose(
        batch.features,
        [
            [39, 0, 1, 0, 1, 1.5, 1, 0],
            [50, 0, 0, 1, 0, 2.25, 0, 1],
            [mean_age, 0, 1, 0, 1, 0, 1, 0],
            [53, 1, 0, 0, members, -1, 1, 0],
        ],
        rtol=1e-6,
    )
    assert batch.targets.tolist() == [1, 0, 1, 0]


def test_a_missing_value_is_named_by_row(tmp_path: Path) -> None:
    table = TABLE.drop_columns(["job", "member"])
    message = error_of(tmp_path, table)
    assert message.startswith("a.parquet, row 3, column 'age': the value is missing")


def test_rows_are_counted_over_row_groups_and_files(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(TABLE.slice(0, 2), tmp_path / "1.parquet")
    bad = pa.table({"x": [1.0, 2.0, 3.0, float("inf")], "y": [0, 1, 0, 1]})
    assert "a.parquet, row 4, column 'x': inf is not finite" in error_of(tmp_path, bad)


def test_several_files_are_one_table(tmp_path: Path) -> None:
    whole = add(tmp_path, TABLE, missing="mean")
    folder = tmp_path / "folder"
    folder.mkdir()
    pyarrow.parquet.write_table(TABLE.slice(0, 1), folder / "1.parquet")
    pyarrow.parquet.write_table(
        TABLE.slice(1).select(TABLE.column_names[::-1]), folder / "2.parquet"
    )
    manifest = ingest(folder, IngestOptions(missing="mean"), DirectoryBlobs(tmp_path / "blobs"))
    assert manifest.splits == whole.splits
    assert manifest.columns == whole.columns


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        (pa.array([1, 2, 3, 4], pa.timestamp("us")), "timestamp[us]"),
        (pa.array([[1], [2], [3], [4]]), "list<"),
        (pa.array([b"a", b"b", b"c", b"d"]), "binary"),
    ],
)
def test_types_that_cannot_be_features_are_named_and_can_be_left_out(
    tmp_path: Path, column: pa.Array, kind: str
) -> None:
    table = pa.table({"x": [1, 2, 3, 4], "odd": column, "y": [0, 1, 0, 1]})
    message = error_of(tmp_path, table)
    assert message.startswith(f"a.parquet, column 'odd': values of type {kind}")
    assert message.endswith("leave the column out with ignore=['odd']")
    assert add(tmp_path, table, ignore=("odd",)).features == 1


def test_numbers_as_categories_and_text_as_numbers(tmp_path: Path) -> None:
    table = pa.table(
        {
            "code": [3, 1, 3, 2],
            "half": [0.5, 2.0, None, 2.0],
            "text": ["1.5", " 2", "?", "3e1"],
            "y": [0, 1, 0, 1],
        }
    )
    options = {"categorical": ("code", "half"), "numeric": ("text",), "missing": "mean"}
    manifest = add(tmp_path, table, **options)
    assert manifest.columns[0].vocabulary == ("1", "2", "3")
    assert manifest.columns[1].vocabulary == ("0.5", "2")
    np.testing.assert_allclose(
        rows_of(tmp_path, manifest).features[:, -1], [1.5, 2, 33.5 / 3, 30], rtol=1e-6
    )
    bad = table.set_column(2, "text", pa.array(["1", "2", "three", "4"]))
    message = error_of(tmp_path, bad, **options)
    assert message == "a.parquet, row 3, column 'text': 'three' is not a number"


def test_pandas_index_columns_are_left_out(tmp_path: Path) -> None:
    table = pa.table({"x": [1, 2], "y": [0, 1], "__index_level_0__": [7, 8]})
    manifest = add(tmp_path, table)
    assert manifest.target == "y"
    assert manifest.feature_names() == ("x",)


def test_a_name_that_two_columns_have_is_refused(tmp_path: Path) -> None:
    columns = [pa.array([1.0, 2.0]), pa.array([5.0, 6.0]), pa.array([0.5, 1.5])]
    table = pa.Table.from_arrays(columns, names=["x", "x", "y"])
    assert error_of(tmp_path, table) == "a.parquet has 2 columns of the name 'x'"
    with pytest.raises(PhalanxError, match="the table has 2 columns of the name 'x'"):
        ingest_arrays(table, None, IngestOptions(), DirectoryBlobs(tmp_path / "blobs"))


def test_a_file_of_another_kind_and_a_table_without_rows(tmp_path: Path) -> None:
    (tmp_path / "b.parquet").write_text("age,job\n1,2\n")
    with pytest.raises(PhalanxError, match=r"b\.parquet is not a Parquet file"):
        ingest(tmp_path / "b.parquet", IngestOptions(), DirectoryBlobs(tmp_path))
    assert "the train split has no rows" in error_of(tmp_path, TABLE.slice(0, 0), missing="mean")
    assert "has no column 'age'" in error_of(
        tmp_path, TABLE, missing="mean", test=_without_age(tmp_path)
    )


def _without_age(folder: Path) -> Path:
    pyarrow.parquet.write_table(TABLE.drop_columns(["age"]), folder / "test.parquet")
    return folder / "test.parquet"
