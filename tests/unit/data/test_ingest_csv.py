"""CSV in: what is understood, what is assumed and said, what is refused and where."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phalanx.data.arrow_values import is_number
from phalanx.data.ingest import ingest
from phalanx.data.manifest import DatasetManifest
from phalanx.data.options import IngestOptions
from phalanx.data.reader import ChunkReader
from phalanx.data.writer import DirectoryBlobs
from phalanx.errors import InvalidArgument, NotFound, PhalanxError
from phalanx.testing.properties import examples
from phalanx.training.sampler import RowSelection

PEOPLE = """age,job,hours,income
39,clerk,40,low
50,smith,13,high
38,clerk,40,low
53,baker,40,low
28,smith,40,high
37,baker,45,high
"""


def add(folder: Path, text: str | bytes, name: str = "data.csv", **options: Any) -> DatasetManifest:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return ingest(path, IngestOptions(**options), DirectoryBlobs(folder / "blobs"))


def rows_of(folder: Path, manifest: DatasetManifest, split: str = "train") -> Any:
    reader = ChunkReader(manifest, split, DirectoryBlobs(folder / "blobs").path, dtype="float64")
    return reader.rows(
        [RowSelection(index, np.arange(rows)) for index, rows in enumerate(reader.chunk_rows)]
    )


def error_of(folder: Path, text: str | bytes, name: str = "data.csv", **options: Any) -> str:
    with pytest.raises(PhalanxError) as caught:
        add(folder, text, name, **options)
    return caught.value.message


def test_columns_become_features_and_text_becomes_categories(tmp_path: Path) -> None:
    manifest = add(tmp_path, PEOPLE)
    assert manifest.target == "income"
    assert manifest.task == "classification"
    assert manifest.classes == ("high", "low")
    assert manifest.feature_names() == ("age", "job=baker", "job=clerk", "job=smith", "hours")
    assert manifest.features == 5
    assert manifest.dtype == "float32"
    batch = rows_of(tmp_path, manifest)
    assert batch.features[0].tolist() == [39, 0, 1, 0, 40]
    assert batch.features[4].tolist() == [28, 0, 0, 1, 40]
    assert batch.targets.tolist() == [1, 0, 1, 1, 0, 0]
    assert manifest.source[0].name == "data.csv"
    assert any("the target is the last column, 'income'" in note for note in manifest.notes)
    assert any("first line of the file is its header" in note for note in manifest.notes)


@pytest.mark.parametrize(
    ("target", "name"),
    [("job", "job"), (2, "job"), ("2", "job"), (-1, "income"), (-3, "job"), ("1", "age")],
)
def test_the_target_is_chosen_by_name_or_number(
    tmp_path: Path, target: str | int, name: str
) -> None:
    manifest = add(tmp_path, PEOPLE, target=target)
    assert manifest.target == name
    assert name not in {column.name for column in manifest.columns}


@pytest.mark.parametrize("target", ["wage", 5, -5, "0.5"])
def test_a_target_that_does_not_exist_is_named_with_the_columns(
    tmp_path: Path, target: str | int
) -> None:
    message = error_of(tmp_path, PEOPLE, target=target)
    assert f"no target column {target!r}; the columns are age, job, hours, income" in message


@pytest.mark.parametrize(
    ("target", "options", "task", "classes"),
    [
        (["1", "0", "1"], {}, "classification", ("0", "1")),
        (["10", "9", "10"], {}, "classification", ("9", "10")),
        (["-1", "+1", "-1"], {}, "classification", ("-1", "1")),
        (["1.5", "2", "3"], {}, "regression", ()),
        (["1.5", "2", "2"], {"task": "classification"}, "classification", ("1.5", "2.0")),
        (["1", "0", "1"], {"task": "regression"}, "regression", ()),
        (["b", "a", "B"], {}, "classification", ("B", "a", "b")),
        ([str(n) for n in range(21)], {}, "regression", ()),
        ([str(n) for n in range(20)], {}, "classification", tuple(str(n) for n in range(20))),
    ],
)
def test_the_task_is_inferred_from_the_target_or_given(
    tmp_path: Path, target: list[str], options: dict[str, Any], task: str, classes: tuple[str, ...]
) -> None:
    text = "x,y\n" + "".join(f"{index},{value}\n" for index, value in enumerate(target))
    manifest = add(tmp_path, text, **options)
    assert manifest.task == task
    assert manifest.classes == classes
    targets = rows_of(tmp_path, manifest).targets
    if task == "classification":
        labels = [manifest.labels()[index] for index in targets]
        assert [type(label)(value) for label, value in zip(labels, target, strict=True)] == labels
    else:
        assert targets.tolist() == [float(value) for value in target]
    said = any(note.startswith(task) for note in manifest.notes)
    assert said == ("task" not in options)


def test_a_headerless_file_gets_numbered_columns(tmp_path: Path) -> None:
    manifest = add(tmp_path, PEOPLE.split("\n", 1)[1])
    assert [column.name for column in manifest.columns] == ["column_1", "column_2", "column_3"]
    assert manifest.target == "column_4"
    assert any("no header line" in note for note in manifest.notes)
    named = add(tmp_path, PEOPLE.split("\n", 1)[1], columns=("a", "b", "c", "d"), target="b")
    assert [column.name for column in named.columns] == ["a", "c", "d"]


@pytest.mark.parametrize(
    ("text", "header", "rows"),
    [
        ("a,b\nx,y\nz,w\n", None, 2),
        ("a,b\nx,y\na,z\n", None, 3),
        ("a,b\nx,y\na,z\n", True, 2),
        ("a,b\nx,y\nz,y\n", False, 3),
        ("1,2\nx,y\nz,w\n", True, 2),
        ("a,a\nx,y\nz,w\n", None, 3),
        ('"a","b"\n1,2\n3,4\n', None, 2),
    ],
)
def test_a_header_is_seen_or_said(
    tmp_path: Path, text: str, header: bool | None, rows: int
) -> None:
    manifest = add(tmp_path, text, header=header, task=None)
    assert manifest.rows("train") == rows


@pytest.mark.parametrize(
    ("text", "options"),
    [
        (PEOPLE.replace(",", ";"), {}),
        (PEOPLE.replace(",", "\t"), {}),
        (PEOPLE.replace(",", "|"), {}),
        (PEOPLE.replace(",", ":"), {"delimiter": ":"}),
        (PEOPLE.replace(",", " , "), {}),
        (PEOPLE.replace("\n", "\r\n"), {}),
        (PEOPLE.replace("\n", "\n\n"), {}),
        (PEOPLE.rstrip("\n"), {}),
        ("\ufeff" + PEOPLE, {}),
        (PEOPLE.replace("39,clerk,40,low", '"39","clerk","40","low"'), {}),
        ("# made by hand\n" + PEOPLE.replace("50,", "#60,clerk,1,low\n50,"), {"comment": "#"}),
    ],
    ids=[
        *("semicolon", "tab", "bar", "colon", "blanks", "crlf", "empty lines", "no last line feed"),
        *("byte order mark", "quotes", "comments"),
    ],
)
def test_ways_to_write_the_same_table(tmp_path: Path, text: str, options: dict[str, Any]) -> None:
    expected = add(tmp_path, PEOPLE)
    manifest = add(tmp_path, text, **options)
    assert manifest.splits == expected.splits
    assert manifest.columns == expected.columns


def test_compressed_files_are_unpacked(tmp_path: Path) -> None:
    expected = add(tmp_path, PEOPLE)
    packed = gzip.compress(PEOPLE.encode())
    assert add(tmp_path, packed, "data.csv.gz").splits == expected.splits
    assert "data.csv.gz" in error_of(tmp_path, packed[:-12], "data.csv.gz")


def test_cells_with_delimiters_quotes_and_line_feeds(tmp_path: Path) -> None:
    text = 'x,name,y\n1,"a,b",p\n2,"say ""hi""",q\n3,"two\nlines",p\n'
    manifest = add(tmp_path, text)
    assert manifest.columns[1].vocabulary == ("a,b", 'say "hi"', "two\nlines")


def test_several_files_are_one_table(tmp_path: Path) -> None:
    whole = add(tmp_path, PEOPLE)
    lines = PEOPLE.splitlines(keepends=True)
    (tmp_path / "a.csv").write_text("".join(lines[:4]))
    (tmp_path / "b.csv").write_text(lines[0] + "".join(lines[4:]))
    paths = [tmp_path / "a.csv", tmp_path / "b.csv"]
    manifest = ingest(paths, IngestOptions(), DirectoryBlobs(tmp_path / "blobs"))
    assert manifest.splits == whole.splits
    assert [source.name for source in manifest.source] == ["a.csv", "b.csv"]
    folder = tmp_path / "folder"
    folder.mkdir()
    for path in paths:
        path.rename(folder / path.name)
    of_folder = ingest(folder, IngestOptions(), DirectoryBlobs(tmp_path / "blobs"))
    assert of_folder.splits == whole.splits


def test_a_test_file_may_order_its_columns_otherwise(tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text("income,hours,age,job,more\nhigh,7,8,baker,1\n")
    manifest = add(tmp_path, PEOPLE, test=tmp_path / "test.csv")
    assert manifest.rows_by_split() == {"train": 6, "test": 1}
    assert rows_of(tmp_path, manifest, "test").features.tolist() == [[8, 1, 0, 0, 7]]
    (tmp_path / "test.csv").write_text("income,age,job\nhigh,8,baker\n")
    assert "test.csv has no column 'hours'" in error_of(
        tmp_path, PEOPLE, test=tmp_path / "test.csv"
    )


def test_files_without_a_header_are_said_to_be_taken_by_position(tmp_path: Path) -> None:
    held_out = tmp_path / "test.csv"
    held_out.write_text(PEOPLE)
    assert "by position" not in " ".join(add(tmp_path, PEOPLE, test=held_out).notes)
    held_out.write_text(PEOPLE.partition("\n")[2])
    manifest = add(tmp_path, PEOPLE, test=held_out)
    note = "has no header line: its columns are taken by position, as age, job, hours, income"
    assert f"test.csv {note}" in manifest.notes
    paths = [tmp_path / "data.csv", held_out]
    manifest = ingest(paths, IngestOptions(), DirectoryBlobs(tmp_path / "blobs"))
    assert f"test.csv {note}" in manifest.notes
    # Where the first file has no header either there is nothing to be mistaken.
    manifest = add(tmp_path, PEOPLE.partition("\n")[2], test=held_out)
    assert "by position" not in " ".join(manifest.notes)


def test_a_bad_cell_of_the_first_line_may_be_of_a_header(tmp_path: Path) -> None:
    message = error_of(tmp_path, "a,,y\n1,2,0\n4,5,1\n7,8,0\n")
    assert message == (
        "data.csv, line 1, column 'column_3': 'y' is not a number "
        "(if the line is a header, say header=True)"
    )


def test_a_header_of_numbers_is_known_from_the_train_file(tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text("2,1,y\n10,20,a\n")
    text = "1,2,y\n3,4,a\n5,6,b\n"
    manifest = add(tmp_path, text, header=True, test=tmp_path / "test.csv")
    assert rows_of(tmp_path, manifest, "test").features.tolist() == [[20, 10]]


def test_fractions_are_held_out_and_statistics_see_train_only(tmp_path: Path) -> None:
    text = "x,c,y\n" + "".join(f"{n},w{n},{n % 2}\n" for n in range(100))
    manifest = add(tmp_path, text, test=0.2, validation=0.1, seed=5)
    assert manifest.rows_by_split() == {"train": 70, "validation": 10, "test": 20}
    train = rows_of(tmp_path, manifest)
    assert len(manifest.columns[1].vocabulary) == 70
    held_out = rows_of(tmp_path, manifest, "test")
    assert not held_out.features[:, 1:].any()
    assert manifest.statistics.count == 70
    np.testing.assert_allclose(manifest.statistics.mean, train.features.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(manifest.statistics.std, train.features.std(axis=0), rtol=1e-12)
    note = "column 'c': values outside the categories of train are encoded as none of them (30)"
    assert note in manifest.notes
    every = sorted(
        int(x)
        for split in ("train", "validation", "test")
        for x in rows_of(tmp_path, manifest, split).features[:, 0]
    )
    assert every == list(range(100))


MISSING = PEOPLE.replace("50,smith", "?,smith").replace("53,baker", "53, NA ")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (PEOPLE.replace("50,smith", "?,smith"), "line 3, column 'age'"),
        (PEOPLE.replace("38,clerk", "38,"), "line 4, column 'job'"),
        (PEOPLE.replace("37,baker,45", '37,"",'), "line 7, column 'job'"),
        (PEOPLE.replace(",13,", ",nan,"), "line 3, column 'hours'"),
    ],
)
def test_a_missing_value_is_an_error_with_its_place_unless_a_choice_is_made(
    tmp_path: Path, text: str, place: str
) -> None:
    message = error_of(tmp_path, text)
    assert message.startswith(f"data.csv, {place}: the value is missing")
    assert "missing='category'" in message
    assert "missing='mean'" in message


def test_a_missing_value_becomes_a_category_or_the_mean(tmp_path: Path) -> None:
    manifest = add(tmp_path, MISSING, missing="category")
    ages = [39, 38, 53, 28, 37]
    assert manifest.columns[0].fill == (sum(ages) / 5,)
    names = manifest.feature_names()
    assert names[1:5] == ("job=baker", "job=clerk", "job=smith", "job is missing")
    features = rows_of(tmp_path, manifest).features
    assert features[1, :5].tolist() == [39, 0, 0, 1, 0]
    assert features[3, :5].tolist() == [53, 0, 0, 0, 1]
    assert "column 'age': missing values were replaced (1)" in manifest.notes


def test_a_missing_value_becomes_the_mean_of_its_features(tmp_path: Path) -> None:
    manifest = add(tmp_path, MISSING, missing="mean")
    features = rows_of(tmp_path, manifest).features
    np.testing.assert_allclose(features[3, 1:4], [0.2, 0.4, 0.4], rtol=1e-6)
    # What replaces missing values moves no mean.
    known = np.delete(features[:, 1:4], 3, axis=0).mean(axis=0)
    np.testing.assert_allclose(manifest.statistics.mean[1:4], known, rtol=1e-6)


def test_own_markers_of_missing_values(tmp_path: Path) -> None:
    text = PEOPLE.replace("50,smith", "-99,smith")
    manifest = add(tmp_path, text, missing="mean", missing_markers=("-99",))
    assert manifest.columns[0].fill == (39.0,)
    assert manifest.missing_markers == ("-99",)


def test_only_a_test_row_misses_a_category(tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text("age,job,hours,income\n1,?,2,low\n")
    manifest = add(tmp_path, PEOPLE, missing="category", test=tmp_path / "test.csv")
    assert not manifest.columns[1].missing_category
    assert rows_of(tmp_path, manifest, "test").features.tolist() == [[1, 0, 0, 0, 2]]


@pytest.mark.parametrize("block_bytes", [64, 1 << 20])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            PEOPLE.replace("38,clerk", "old,clerk"),
            "line 4, column 'age': 'old' is not a number (if the column holds categories, say c",
        ),
        (PEOPLE.replace("37,", "1_0,"), "data.csv, line 7, column 'age': '1_0' is not a number"),
        (PEOPLE.replace("53,baker,40", "53,baker"), "data.csv, line 5: 3 cells, expected 4"),
        (PEOPLE + "1,clerk,3,low,9\n", "data.csv, line 8: 5 cells, expected 4"),
        (PEOPLE + "1\n", "data.csv, line 8: 1 cell, expected 4"),
        (
            PEOPLE.replace("28,smith,40", "28,smith,inf"),
            "line 6, column 'hours': inf is not finite",
        ),
        (PEOPLE.replace("28,smith,40", "28,smith,1e39"), "1e+39 is too large for float32"),
        (PEOPLE.replace("40,low\n53", "40,\n53"), "line 4, column 'income': the target is missing"),
        ("a,a,b\n1,2,3\n", "data.csv, line 1: the column name 'a' occurs twice"),
        ("", "data.csv has no rows"),
        ("\n\n", "data.csv has no rows"),
        ("a,b\n", "data.csv has a header line and no rows"),
        ("x,y\n1,2\n2,2\n", "has the same target '2' in 'y'"),
        ("y\n1\n2\n", "no column is left to learn from"),
        (PEOPLE.encode().replace(b"baker,40", b"b\xe4ker,40"), "data.csv, line 5: not UTF-8 text"),
    ],
)
def test_errors_name_file_line_column_and_value(
    tmp_path: Path, text: str | bytes, expected: str, block_bytes: int
) -> None:
    assert expected in error_of(tmp_path, text, block_bytes=block_bytes)


def test_ends_of_labels_can_be_cut_off(tmp_path: Path) -> None:
    held_out = tmp_path / "test.csv"
    held_out.write_text("|a remark\n20,smith,1,low.\n21,clerk,2,high.\n")
    message = error_of(tmp_path, PEOPLE, test=held_out)
    assert message.endswith("(if that line is a comment, say comment='|')")
    message = error_of(tmp_path, PEOPLE, test=held_out, comment="|")
    assert message.endswith("(if '.' is not a part of it, say trim_labels='.')")
    manifest = add(tmp_path, PEOPLE, test=held_out, comment="|", trim_labels=".!")
    assert manifest.classes == ("high", "low")
    assert rows_of(tmp_path, manifest, "test").targets.tolist() == [1, 0]
    # In the train split as well.
    manifest = add(tmp_path, PEOPLE.replace("low\n38", "low!\n38"), trim_labels=".!")
    assert manifest.classes == ("high", "low")


def test_lines_are_counted_past_comments_blank_lines_and_quoted_line_feeds(tmp_path: Path) -> None:
    text = '# one\n\nx,name,y\n1,"two\nlines",0\n\n# two\n2,b,1\nbad,c,0\n'
    expected = "data.csv, line 9, column 'x': 'bad' is not a number"
    assert expected in error_of(tmp_path, text, comment="#", numeric=("x",))


def test_a_bad_cell_far_into_a_file_is_found(tmp_path: Path) -> None:
    lines = [f"{n},{n % 7},{n % 2}" for n in range(30_000)]
    lines[23_456] = "23456,x,0"
    message = error_of(tmp_path, "a,b,y\n" + "\n".join(lines), block_bytes=4096)
    assert message.startswith("data.csv, line 23458, column 'b': 'x' is not a number")


def test_a_bad_cell_in_a_column_that_is_left_out_does_not_matter(tmp_path: Path) -> None:
    text = PEOPLE.replace("38,clerk", "old,clerk")
    manifest = add(tmp_path, text, ignore=("age",))
    assert manifest.feature_names()[0] == "job=baker"
    assert "there is no column 'wage' to ignore" in error_of(tmp_path, PEOPLE, ignore=("wage",))


def test_kinds_can_be_said(tmp_path: Path) -> None:
    manifest = add(tmp_path, PEOPLE, categorical=("hours",))
    assert manifest.columns[2].vocabulary == ("13", "40", "45")
    assert "'clerk' is not a number" in error_of(tmp_path, PEOPLE, numeric=("job",))
    assert "has no column 'wage'" in error_of(tmp_path, PEOPLE, numeric=("wage",))


def test_too_many_categories_are_an_error_with_a_way_out(tmp_path: Path) -> None:
    text = "x,id,y\n" + "".join(f"{n},id{n},{n % 2}\n" for n in range(60))
    message = error_of(tmp_path, text, max_categories=50)
    assert "column 'id' has more than 50 different values" in message
    assert "ignore=['id']" in message
    assert add(tmp_path, text, max_categories=60).features == 61


def test_a_label_that_only_the_test_split_has_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text("age,job,hours,income\n1,baker,2,low\n1,baker,2,middling\n")
    message = error_of(tmp_path, PEOPLE, test=tmp_path / "test.csv")
    assert message.startswith("test.csv, line 3, column 'income': the label 'middling' does not")
    assert message.endswith("whose classes are high, low")


def test_a_text_target_is_no_regression(tmp_path: Path) -> None:
    message = error_of(tmp_path, PEOPLE, task="regression")
    assert (
        "line 2, column 'income': the target 'low' is text, a regression needs numbers" in message
    )


def test_an_empty_column_cannot_be_filled(tmp_path: Path) -> None:
    message = error_of(tmp_path, "a,b,y\n1,,0\n2,,1\n", missing="mean")
    assert "column 'b' has no value in the train split" in message


def test_missing_files_and_unknown_endings(tmp_path: Path) -> None:
    sink = DirectoryBlobs(tmp_path)
    with pytest.raises(NotFound, match=r"no file .*nothing\.csv"):
        ingest(tmp_path / "nothing.csv", IngestOptions(), sink)
    assert "say format= with one of csv, parquet" in error_of(tmp_path, PEOPLE, "data.doc")
    assert add(tmp_path, PEOPLE, "data.doc", format="csv").features == 5
    assert "unknown format 'doc'" in error_of(tmp_path, PEOPLE, format="doc")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test": -0.5}, "test: a fraction lies between 0 and 1, not at -0.5"),
        ({"test": 1.5}, "test: a fraction lies between 0 and 1, not at 1.5"),
        ({"test": 0.6, "validation": 0.5}, "test and validation take 1.1 of the rows"),
        ({"missing": "drop"}, "missing: is error, category or mean, not 'drop'"),
        ({"task": "ranking"}, "task: is classification or regression, not 'ranking'"),
        ({"dtype": "float16"}, "dtype: is float32 or float64"),
        ({"chunk_bytes": 17 << 20}, "chunk_bytes: is 1024 to"),
        ({"delimiter": ",,"}, "delimiter: is one character"),
        ({"target": 0}, "columns are numbered from 1"),
        ({"categorical": ("a",), "numeric": ("a",)}, "a cannot be numeric as well"),
    ],
)
def test_wrong_options_are_all_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=r"layout: is auto") as caught:
        IngestOptions(layout="ring", **options)  # type: ignore[arg-type]
    assert message in caught.value.message
    assert len(caught.value.violations) == 2
    with pytest.raises(InvalidArgument, match="unknown option colour"):
        IngestOptions.from_mapping({"colour": 1})


def test_a_quote_that_never_closes_swallows_no_rows(tmp_path: Path) -> None:
    text = 'y,n\n1,a\n0,b\n1,a\n0,"c\n1,d\n0,e\n'
    message = error_of(tmp_path, text, target="y")
    assert message == "data.csv: a quote in the row of line 5 is never closed"
    # An inch is no quote, and an odd number of them no mistake.
    assert add(tmp_path, 'y,n\n1,5"\n0,b\n', target="y").columns[0].vocabulary == ('5"', "b")


@pytest.mark.parametrize("damaged", [b"x,y\n1,0\n", b"\x1f\x8b\x08\x00cut off", b"\x1f\x8b"])
def test_a_file_that_is_not_what_its_ending_says(tmp_path: Path, damaged: bytes) -> None:
    assert "data.csv.gz is damaged" in error_of(tmp_path, damaged, "data.csv.gz")


def test_labels_that_reading_has_rounded_are_refused(tmp_path: Path) -> None:
    text = "x,y\n1,9007199254740992\n2,9007199254740993\n3,5\n"
    message = error_of(tmp_path, text)
    assert "labels such as 9007199254740992" in message
    assert "categorical=['y']" in message
    assert add(tmp_path, text, categorical=("y",)).classes == (
        "5",
        "9007199254740992",
        "9007199254740993",
    )


def test_a_regression_on_text_says_so_where_nothing_else_is_studied(tmp_path: Path) -> None:
    message = error_of(tmp_path, "x,y\n1,a\n2,b\n", task="regression")
    assert (
        message
        == "data.csv, line 2, column 'y': the target 'a' is text, a regression needs numbers"
    )


def test_a_table_of_which_nothing_is_left_is_refused(tmp_path: Path) -> None:
    assert error_of(tmp_path, "x,y\n1,0\n2,1\n", ignore=("x", "y")) == (
        "no column is left to predict"
    )


def test_a_split_without_rows_is_refused(tmp_path: Path) -> None:
    assert "the test split has no row" in error_of(tmp_path, PEOPLE, test=0.01)


def test_notes_are_in_the_order_of_the_columns(tmp_path: Path) -> None:
    text = "n,w,y\n1,a,p\n2,,q\n,b,p\n4,b,q\n"
    for block_bytes in (64, 1 << 20):
        manifest = add(tmp_path, text, missing="mean", block_bytes=block_bytes)
        replaced = [note for note in manifest.notes if "missing values were" in note]
        assert [note.split("'")[1] for note in replaced] == ["n", "w"]


@examples(30)
@given(data=st.data())
def test_the_result_does_not_depend_on_the_size_of_blocks(
    data: st.DataObject, tmp_path: Path
) -> None:
    words = st.sampled_from(["a", "b", "c", "?", "länger"])
    numbers = st.one_of(st.just("?"), st.floats(-1e6, 1e6).map(repr), st.integers(-9, 9).map(str))
    rows = data.draw(st.lists(st.tuples(numbers, words, st.sampled_from("pq")), min_size=30))
    lines = ["n,w,y", "1,a,p", "2,b,q", "3,c,p", *(",".join(row) for row in rows)]
    options = {"missing": data.draw(st.sampled_from(["category", "mean"])), "test": 0.2}
    block = data.draw(st.integers(64, 2000))
    whole = add(tmp_path, "\n".join(lines), **options)
    assert add(tmp_path, "\n".join(lines), block_bytes=block, **options) == whole


@examples(200)
@given(st.text(alphabet="0123456789+-.eE infaINFty_x", min_size=1, max_size=8))
def test_what_counts_as_a_number_is_what_the_parser_takes(text: str) -> None:
    import io

    import pyarrow as pa
    import pyarrow.csv

    try:
        pyarrow.csv.read_csv(
            io.BytesIO(f"{text}|0\n".encode()),
            read_options=pyarrow.csv.ReadOptions(column_names=["a", "b"], use_threads=False),
            parse_options=pyarrow.csv.ParseOptions(delimiter="|"),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types={"a": pa.float64()}, null_values=[]
            ),
        )
        parsed = True
    except pa.ArrowInvalid:
        parsed = False
    assert is_number(text) == parsed
