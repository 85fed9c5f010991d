"""Which models a job may start from, told from the head of their file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phalanx.data.choice import RawColumns
from phalanx.data.manifest import Column
from phalanx.errors import InvalidArgument
from phalanx.specs.starting import (
    HEADER_LIMIT_BYTES,
    MISFIT,
    TrainedOn,
    check_columns,
    check_shapes,
    header_bytes,
    shapes_in_file,
    trained_on,
)
from phalanx.v1.job_spec_pb2 import Data

WANTED = {"weights": (8, 2), "bias": (2,)}


def file_of(folder: Path, header: bytes) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    return path


def test_the_same_tensors_fit_in_any_order_and_dtype(tmp_path: Path) -> None:
    tensors = {
        "__metadata__": {"format": "phalanx-1"},
        "bias": {"dtype": "F64", "shape": [2], "data_offsets": [0, 16]},
        "weights": {"dtype": "F64", "shape": [8, 2], "data_offsets": [16, 144]},
    }
    check_shapes(shapes_in_file(file_of(tmp_path, json.dumps(tensors).encode())), WANTED)


@pytest.mark.parametrize(
    ("stored", "says"),
    [
        ({**WANTED, "weights": (8, 3)}, r"'weights' in the shape \[8, 3\] and .* needs \[8, 2\]"),
        ({**WANTED, "weights": (16,)}, r"'weights' in the shape \[16\] and .* needs \[8, 2\]"),
        ({"weights": (8, 2)}, r"no tensor 'bias' and the model of this job needs \[2\]"),
        ({**WANTED, "more": (4, 5)}, r"a tensor 'more' \[4, 5\], and the model of this job none"),
    ],
)
def test_other_tensors_are_refused_with_both_shapes(
    stored: dict[str, tuple[int, ...]], says: str
) -> None:
    with pytest.raises(InvalidArgument, match=f"^train.start.model does not fit: .*{says}") as said:
        check_shapes(stored, WANTED)
    assert said.value.reason == MISFIT
    assert [each.field for each in said.value.violations] == ["train.start.model"]


@pytest.mark.parametrize(
    "header",
    [
        *(b"", b"{", b"[]", b'{"w": 1}', b'{"w": {}}', b'{"w": {"shape": ["x"]}}'),
        *(b'{"w": {"shape": [Infinity]}}', b"[" * 100_000),
    ],
)
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, header: bytes) -> None:
    with pytest.raises(InvalidArgument, match=r"train\.start\.model holds no parameters"):
        shapes_in_file(file_of(tmp_path, header))


@pytest.mark.parametrize("first", [b"", b"\1" * 7, (HEADER_LIMIT_BYTES + 1).to_bytes(8, "little")])
def test_a_header_that_cannot_be_is_not_read(first: bytes) -> None:
    with pytest.raises(InvalidArgument, match=r"train\.start\.model holds no parameters"):
        header_bytes(first)


NAMED = RawColumns(3, (Column("a"), Column("b"), Column("c")))
PLACES = RawColumns(3)


@pytest.mark.parametrize(
    ("model", "chosen", "columns"),
    [
        (TrainedOn(("a", "b"), chosen=True), ["c", "b"], NAMED),
        (TrainedOn(("b", "a"), chosen=True), ["a", "b"], NAMED),
        (TrainedOn(("d", "e", "f"), chosen=True), [], NAMED),
        (TrainedOn(("a", "b")), ["b", "c"], NAMED),
        (TrainedOn(("x1", "x3"), chosen=True), ["x1", "x2"], PLACES),
    ],
)
def test_other_columns_are_refused_by_their_names(
    model: TrainedOn, chosen: list[str], columns: RawColumns
) -> None:
    data = Data(name="d", features=chosen)
    assert model.needs_columns(data)
    with pytest.raises(InvalidArgument, match="trained on the columns") as said:
        check_columns(model, data, columns)
    assert said.value.reason == MISFIT
    assert [each.field for each in said.value.violations] == ["train.start.model"]


@pytest.mark.parametrize(
    ("model", "chosen", "columns"),
    [
        (TrainedOn(("a", "b"), chosen=True), ["a", "b"], NAMED),
        (TrainedOn(("a", "b", "c"), chosen=True), [], NAMED),
        (TrainedOn(("d", "e", "f")), [], NAMED),
        (TrainedOn(("x1", "x3"), chosen=True), [], RawColumns(2)),
        (TrainedOn(), ["a", "b"], NAMED),
    ],
)
def test_the_same_columns_and_those_of_which_nothing_is_known_fit(
    model: TrainedOn, chosen: list[str], columns: RawColumns
) -> None:
    check_columns(model, Data(name="d", features=chosen), columns)


def test_columns_are_read_from_the_description_of_a_model() -> None:
    columns = [{"name": "a"}, {"name": "b"}]
    text = json.dumps({"columns": columns, "chosen_from": {"count": 3}})
    assert trained_on(text.encode()) == TrainedOn(("a", "b"), chosen=True)
    whole = json.dumps({"columns": columns, "chosen_from": None})
    assert trained_on(whole.encode()) == TrainedOn(("a", "b"))
    for nothing in (b"", b"[]", b"{}", b'{"columns": 1}', b"\xff"):
        assert trained_on(nothing) == TrainedOn()
