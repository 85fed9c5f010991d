"""Which models a job may start from, told from the head of their file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phalanx.errors import InvalidArgument
from phalanx.specs.starting import (
    HEADER_LIMIT_BYTES,
    MISFIT,
    check_shapes,
    header_bytes,
    shapes_in_file,
)

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
    [b"", b"{", b"[]", b'{"w": 1}', b'{"w": {}}', b'{"w": {"shape": ["x"]}}', b"[" * 100_000],
)
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, header: bytes) -> None:
    with pytest.raises(InvalidArgument, match=r"train\.start\.model holds no parameters"):
        shapes_in_file(file_of(tmp_path, header))


@pytest.mark.parametrize("first", [b"", b"\1" * 7, (HEADER_LIMIT_BYTES + 1).to_bytes(8, "little")])
def test_a_header_that_cannot_be_is_not_read(first: bytes) -> None:
    with pytest.raises(InvalidArgument, match=r"train\.start\.model holds no parameters"):
        header_bytes(first)
