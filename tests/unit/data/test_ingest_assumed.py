"""What is assumed of a table is said, and what is more likely a mistake is asked about."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse

from phalanx.data.arrow_values import is_number_elsewhere
from phalanx.data.ingest import ingest, ingest_arrays
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


@pytest.mark.parametrize("text", ["1,5", "-0,5", ",5", "1.003,50", "1,003", "12 003", "1'003.5"])
def test_numbers_as_they_are_written_elsewhere_are_known(text: str) -> None:
    assert is_number_elsewhere(text)


@pytest.mark.parametrize("text", ["1.5", "1003", "1,", "1,2,3", "12,34,567", "1.2.3", "a1,5", ""])
def test_what_else_holds_digits_and_commas_is_text(text: str) -> None:
    assert not is_number_elsewhere(text)


RULE = (
    "looks like a number, as most of the column does, but numbers have a decimal point here and "
    "nothing between thousands; convert them first (pandas.read_csv takes decimal=',' or "
    "thousands=','), or say {} if they are none"
)


@pytest.mark.parametrize(
    ("text", "place", "otherwise"),
    [
        ("a;b;y\n7;2,2;0\n2;2,3;1\n", "line 2, column 'b': '2,2'", "categorical=['b']"),
        ("1,5;2,2;0\n1,6;2,3;1\n", "line 1, column 'column_1': '1,5'", "categorical=['column_1']"),
        ('x,y\n17,0\n"1,003",1\n"2,500",0\n', "line 3, column 'x': '1,003'", "categorical=['x']"),
        ("x;y\n2;low\nmany;low\n3,5;high\n4,5;high\n", "line 4, column 'x': '3,5'", None),
        ("x;y\n1;0,5\n2;1,5\n3;2\n", "line 2, column 'y': '0,5'", "task='classification'"),
    ],
    ids=["decimal comma", "without a header", "thousands", "some are none", "target"],
)
def test_numbers_of_another_country_do_not_become_categories(
    tmp_path: Path, text: str, place: str, otherwise: str | None
) -> None:
    expected = RULE.format(otherwise or "categorical=['x']")
    assert error_of(tmp_path, text) == f"data.csv, {place} {expected}"


def test_more_of_them_than_there_may_be_categories_are_told_as_what_they_are(
    tmp_path: Path,
) -> None:
    lines = [f"{n},5;{n},25;{n % 2}\n" for n in range(1500)]
    assert "line 2, column 'a': '0,5' looks like" in error_of(tmp_path, "a;b;y\n" + "".join(lines))
    lines = [f"{n};{n},5\n" for n in range(10_500)]
    assert "line 2, column 'y': '0,5' looks like" in error_of(tmp_path, "a;y\n" + "".join(lines))


def test_text_columns_of_frames_and_arrays_are_looked_at_too(tmp_path: Path) -> None:
    frame = {"x": ["1,5", "2,5", "3"], "y": [0, 1, 0]}
    with pytest.raises(InvalidArgument, match="the table, row 1, column 'x': '1,5' looks like"):
        ingest_arrays(frame, None, IngestOptions(), Digests())
    with pytest.raises(InvalidArgument, match="the data, row 1, target: '1,5' looks like"):
        ingest_arrays([[1.0], [2.0]], ["1,5", "2,5"], IngestOptions(), Digests())


def test_what_is_meant_as_categories_is_taken_so(tmp_path: Path) -> None:
    text = "x;y\n1,2;1,5\n2,3;2,5\n1,2;1,5\n"
    manifest = add(tmp_path, text, categorical=("x",), task="classification")
    assert manifest.feature_names() == ("x=1,2", "x=2,3")
    assert manifest.classes == ("1,5", "2,5")
    # Few such words among others need no asking.
    assert add(tmp_path, "x;y\n1,2;0\nbig;1\nlow;0\n").features == 3
    assert add(tmp_path, "x;n;y\n1,2;3;0\n2,3;4;1\n", ignore=("x",)).features == 1


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("x;y\n1;0\n2;1\n3,5;1\n", {}, "line 4, column 'x': '3,5' is not a number"),
        ("x;y\n3,5;1\n3,6;0\n", {"numeric": ("x",)}, "line 2, column 'x': '3,5' is not a number"),
        (
            "x;y\n1;3,5\n2;4,5\n",
            {"task": "regression"},
            "line 2, column 'y': the target '3,5' is text, a regression needs numbers",
        ),
    ],
)
def test_a_cell_that_is_a_number_elsewhere_says_how_to_write_it(
    tmp_path: Path, text: str, options: dict[str, Any], message: str
) -> None:
    rule = "(numbers have a decimal point here and nothing between thousands)"
    assert error_of(tmp_path, text, **options) == f"data.csv, {message} {rule}"


def test_columns_taken_as_categories_are_said(tmp_path: Path) -> None:
    text = "age,town,job,y\n1,ulm,a,0\n2,bonn,b,1\n3,ulm,c,0\n"
    note = "2 columns of words as categories, 5 features in all: town, job (option `numeric` "
    assert f"{note}overrules)" in add(tmp_path, text).notes
    note = "1 column of words as categories, 3 features in all: job (option `numeric` overrules)"
    assert note in add(tmp_path, text, categorical=("town",)).notes
    assert "of words" not in " ".join(add(tmp_path, text, categorical=("town", "job")).notes)
    names = [f"c{number}" for number in range(30)]
    wide = "\n".join([",".join([*names, "y"]), ",".join(["a"] * 30 + ["1"]), "b," * 30 + "2"])
    note = "30 columns of words as categories, 60 features in all: c0, c1, c2, c3, c4, c5, c6, c7, "
    assert f"{note}… (30 in all) (option `numeric` overrules)" in add(tmp_path, wide).notes


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("x,y\n1,a\n2,b\0\n", "line 3, column 'y': 'b\\x00'"),
        ("x,y\na,1\nc,2\n\0,2\n", "line 4, column 'x': '\\x00'"),
    ],
)
def test_a_nul_is_a_part_of_no_label_and_no_category(tmp_path: Path, text: str, place: str) -> None:
    assert error_of(tmp_path, text) == (
        f"data.csv, {place} holds a NUL, which no text does; is the file damaged, or text of "
        "another encoding than UTF-8?"
    )


def test_a_nul_in_frames_arrays_and_names(tmp_path: Path) -> None:
    with pytest.raises(
        InvalidArgument, match=r"the table, row 2, column 'x': 'a.x00b' holds a NUL"
    ):
        ingest_arrays({"x": ["a", "a\0b"], "y": [0, 1]}, None, IngestOptions(), Digests())
    with pytest.raises(InvalidArgument, match=r"the data, row 1, target: 'a.x00b' holds a NUL"):
        ingest_arrays([[1.0], [2.0]], ["a\0b", "b"], IngestOptions(), Digests())
    with pytest.raises(InvalidArgument, match=r"the column name 'x.x00' holds a NUL"):
        ingest_arrays({"x\0": [1, 2], "y": [0, 1]}, None, IngestOptions(), Digests())
    (tmp_path / "wide.csv").write_bytes("x,y\n1,2\n2,3\n".encode("utf-16-le"))
    with pytest.raises(InvalidArgument, match=r"wide\.csv, line 1, column 1: 'x.x00' holds a NUL"):
        ingest(tmp_path / "wide.csv", IngestOptions(), Digests())


def test_numbers_that_float32_cannot_tell_apart_are_said(tmp_path: Path) -> None:
    """Seconds of a few minutes are all but the same number, and nothing else would tell."""
    lines = [f"{1_700_000_000 + row},{row / 7},{row % 2}" for row in range(400)]
    text = "\n".join(["time,x,y", *lines])
    (note,) = [each for each in add(tmp_path, text).notes if "float32" in each]
    assert "vary: time (steps of 128); subtract" in note
    assert "x" not in note.partition("vary:")[2].partition(";")[0]
    assert not [each for each in add(tmp_path, text, dtype="float64").notes if "float32" in each]


@pytest.mark.parametrize(
    ("offset", "scale", "noted"),
    [(0.0, 1.0, False), (1e5, 1.0, False), (16e6, 10.0, False), (1e7, 1.0, True), (1e9, 1.0, True)],
)
@pytest.mark.parametrize("sparse", [False, True])
def test_numbers_that_float32_tells_apart_are_not(
    offset: float, scale: float, noted: bool, sparse: bool
) -> None:
    features = offset + scale * np.random.default_rng(0).normal(size=(300, 2))
    features[:, 1] = 3.0
    rows = scipy.sparse.csr_array(features) if sparse else features
    notes = ingest_arrays(rows, np.arange(300) % 2, IngestOptions(), Digests()).notes
    assert any("vary: x1 (" in each for each in notes) == noted
