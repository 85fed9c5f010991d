"""What is assumed of a table is said, and what is more likely a mistake is asked about."""

from pathlib import Path
from typing import Any

import pytest

from phalanx.data.ingest import ingest
from phalanx.data.linking import Digests
from phalanx.data.manifest import DatasetManifest
from phalanx.data.options import IngestOptions
from phalanx.errors import InvalidArgument

INDEXED = ",a,b,y\n0,1.5,x,0\n1,2.5,x,1\n2,0.5,z,1\n"


def add(folder: Path, text: str, name: str = "data.csv", **options: Any) -> DatasetManifest:
    (folder / name).write_text(text)
    return ingest(folder / name, IngestOptions(**options), Digests())


def error_of(folder: Path, text: str, **options: Any) -> str:
    with pytest.raises(InvalidArgument) as caught:
        add(folder, text, **options)
    return caught.value.message


def names_of(manifest: DatasetManifest) -> list[str]:
    return [column.name for column in manifest.columns]


@pytest.mark.parametrize(
    "text",
    [
        INDEXED,
        INDEXED.replace("\n0,", "\n17,").replace("\n1,", "\n4,"),
        '"","a","b","y"\n"Mazda",1.5,"x",0\n"Fiat",2.5,"x",1\n"Volvo",0.5,"z",1\n',
        INDEXED.replace("1.5", "p").replace("2.5", "p").replace("0.5", "q").replace(",y", ",yes"),
    ],
    ids=["of pandas", "shuffled", "names of rows, as R writes them", "over words"],
)
def test_an_index_without_a_name_is_left_out_and_said(tmp_path: Path, text: str) -> None:
    manifest = add(tmp_path, text)
    assert manifest.rows("train") == 3
    assert names_of(manifest) == ["a", "b"]
    assert (
        "the first column has no name and another value in each row, as an index that pandas or R "
        "wrote: it is left out ('column_1' in option `numeric` or `categorical` keeps it)"
    ) in manifest.notes


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"numeric": ("column_1",)}, ["column_1", "a", "b"]),
        ({"categorical": ("column_1",)}, ["column_1", "a", "b"]),
        ({"columns": ("id", "a", "b", "y")}, ["id", "a", "b"]),
        ({"ignore": ("column_1",)}, ["a", "b"]),
        ({"target": 1, "task": "regression"}, ["a", "b", "y"]),
        ({"target": -4, "task": "regression"}, ["a", "b", "y"]),
        ({"target": "column_1", "task": "regression"}, ["a", "b", "y"]),
    ],
)
def test_whatever_is_said_of_the_index_counts(
    tmp_path: Path, options: dict[str, Any], names: list[str]
) -> None:
    manifest = add(tmp_path, INDEXED, **options)
    assert names_of(manifest) == names
    assert "has no name" not in " ".join(manifest.notes)


def test_columns_are_numbered_as_they_stand_in_the_file(tmp_path: Path) -> None:
    manifest = add(tmp_path, INDEXED, target=4)
    assert (manifest.target, names_of(manifest)) == ("y", ["a", "b"])


@pytest.mark.parametrize(
    "text",
    [
        INDEXED.replace("\n1,", "\n0,"),
        INDEXED.replace("\n1,", "\n0.25,"),
        INDEXED.replace("\n0,", "\n,").replace("\n1,", "\n?,"),
    ],
    ids=["twice the same", "a fraction", "missing"],
)
def test_a_first_column_that_is_no_index_is_kept_and_said(tmp_path: Path, text: str) -> None:
    manifest = add(tmp_path, text, missing="mean")
    assert names_of(manifest) == ["column_1", "a", "b"]
    note = "the first column has no name and is called 'column_1' (option `ignore` leaves it out)"
    assert note in manifest.notes


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        (",clerk,low\n39,smith,high\n40,clerk,low\n", 3),
        (",1,2\n3,4,5\n", 2),
    ],
    ids=["words that come again", "numbers"],
)
def test_a_first_row_that_lacks_a_value_is_no_header(tmp_path: Path, text: str, rows: int) -> None:
    manifest = add(tmp_path, text, missing="mean", header=None)
    assert manifest.rows("train") == rows
    assert "the file has no header line (option `header` overrules)" in manifest.notes


def test_a_split_may_have_an_index_or_none(tmp_path: Path) -> None:
    held_out = tmp_path / "test.csv"
    for text in (INDEXED, "a,b,y\n1.5,x,0\n2.5,x,1\n0.5,z,1\n"):
        held_out.write_text(text)
        manifest = add(tmp_path, INDEXED, test=held_out)
        assert manifest.rows("test") == 3
        assert names_of(manifest) == ["a", "b"]
