"""Chunk files: what is written is what is mapped, in a form that others can read."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from phalanx.data.chunks import (
    CHUNK_LIMIT_BYTES,
    CsrChunk,
    DenseChunk,
    decode_chunk,
    encode_csr,
    encode_dense,
    open_chunk,
)
from phalanx.errors import DataLoss, InvalidArgument
from phalanx.testing.properties import examples

shapes = st.tuples(st.integers(0, 20), st.integers(1, 9))


@examples(60)
@given(
    data=st.data(),
    shape=shapes,
    dtype=st.sampled_from(["uint8", "float32", "float64"]),
    target_dtype=st.sampled_from(["int64", "float64"]),
)
def test_dense_chunk_round_trips_and_is_plain_safetensors(
    data: st.DataObject, shape: tuple[int, int], dtype: str, target_dtype: str
) -> None:
    features = data.draw(hnp.arrays(np.dtype(dtype), shape))
    targets = data.draw(hnp.arrays(np.dtype(target_dtype), shape[0]))
    encoded = encode_dense(features, targets)
    chunk = decode_chunk(encoded)
    assert isinstance(chunk, DenseChunk)
    assert chunk.features.dtype == features.dtype
    assert chunk.features.tobytes() == features.tobytes()
    assert chunk.targets.tobytes() == targets.tobytes()
    theirs = safetensors.numpy.load(encoded)
    assert theirs["features"].tobytes() == features.tobytes()
    assert theirs["targets"].tobytes() == targets.tobytes()


@examples(60)
@given(
    lengths=st.lists(st.integers(0, 5), max_size=12), dtype=st.sampled_from(["float32", "float64"])
)
def test_csr_chunk_round_trips_and_is_plain_safetensors(lengths: list[int], dtype: str) -> None:
    count = sum(lengths)
    values = np.arange(1, count + 1, dtype=dtype)
    indices = np.arange(count, dtype=np.int64) % 7
    indptr = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
    targets = np.arange(len(lengths), dtype=np.int64)
    encoded = encode_csr(values, indices, indptr, targets)
    chunk = decode_chunk(encoded)
    assert isinstance(chunk, CsrChunk)
    assert chunk.indices.dtype == chunk.indptr.dtype == np.int32
    for mine, name in ((chunk.data, "data"), (chunk.indices, "indices"), (chunk.indptr, "indptr")):
        assert mine.tobytes() == safetensors.numpy.load(encoded)[name].tobytes()
    assert chunk.data.tolist() == values.tolist()
    assert chunk.indices.tolist() == indices.tolist()
    assert chunk.indptr.tolist() == indptr.tolist()
    assert chunk.targets.tolist() == targets.tolist()


def test_equal_rows_make_equal_bytes_whatever_the_memory_layout() -> None:
    features = np.arange(12, dtype=np.float32).reshape(3, 4)
    targets = np.arange(3, dtype=np.int64)
    plain = encode_dense(features, targets)
    assert encode_dense(np.asfortranarray(features), targets) == plain
    assert encode_dense(features.astype(">f4"), targets.astype(">i8")) == plain


def test_opening_maps_the_file_without_copying(tmp_path: Path) -> None:
    path = tmp_path / "chunk"
    path.write_bytes(encode_dense(np.eye(4, dtype=np.float32), np.arange(4, dtype=np.int64)))
    chunk = open_chunk(path)
    assert isinstance(chunk, DenseChunk)
    assert not chunk.features.flags.owndata
    assert not chunk.features.flags.writeable
    assert chunk.features.ctypes.data % 4 == 0
    path.unlink()
    assert chunk.features[2].tolist() == [0, 0, 1, 0]


def test_every_tensor_lies_on_a_multiple_of_its_item_size() -> None:
    odd = decode_chunk(encode_dense(np.ones((3, 5), np.uint8), np.arange(3, dtype=np.int64)))
    assert isinstance(odd, DenseChunk)
    assert odd.targets.flags.aligned
    three = np.ones(3, np.float64)
    row = encode_csr(three, np.arange(3), np.array([0, 3]), np.zeros(1, np.int64))
    csr = decode_chunk(row)
    assert isinstance(csr, CsrChunk)
    assert all(each.flags.aligned for each in (csr.data, csr.indices, csr.indptr, csr.targets))


def test_bytes_behind_the_last_tensor_are_no_part_of_a_chunk() -> None:
    whole = encode_dense(np.ones((3, 5), np.uint8), np.arange(3, dtype=np.int64))
    with pytest.raises(DataLoss, match="bytes are left over"):
        decode_chunk(whole + b"\0")


def test_a_chunk_over_the_limit_is_refused() -> None:
    features = np.zeros((CHUNK_LIMIT_BYTES // 1024 + 1, 1024), dtype=np.uint8)
    with pytest.raises(InvalidArgument, match="over the limit of 16777216"):
        encode_dense(features, np.zeros(len(features), dtype=np.int64))


@pytest.mark.parametrize(
    ("features", "targets"),
    [
        (np.zeros(3, np.float32), np.zeros(3, np.int64)),
        (np.zeros((3, 2), np.float32), np.zeros(2, np.int64)),
        (np.zeros((3, 2), np.float16), np.zeros(3, np.int64)),
    ],
)
def test_wrong_shapes_and_types_are_refused(features: NDArray[Any], targets: NDArray[Any]) -> None:
    with pytest.raises(InvalidArgument):
        encode_dense(features, targets)


def test_a_csr_chunk_whose_parts_do_not_fit_is_refused() -> None:
    one = np.ones(2, np.float32)
    with pytest.raises(InvalidArgument, match="row starts"):
        encode_csr(one, np.zeros(2, np.int32), np.array([0, 1]), np.zeros(1, np.int64))
    with pytest.raises(InvalidArgument, match="one index per value"):
        encode_csr(one, np.zeros(1, np.int32), np.array([0, 2]), np.zeros(1, np.int64))


@examples(100)
@given(cut=st.integers(0, 300), flip=st.integers(0, 60), byte=st.integers(0, 255))
def test_damaged_bytes_are_named_as_such_or_keep_their_shape(
    cut: int, flip: int, byte: int
) -> None:
    encoded = bytearray(
        encode_dense(np.ones((5, 3), dtype=np.float32), np.arange(5, dtype=np.int64))
    )
    encoded[flip] = byte
    damaged = bytes(encoded[: len(encoded) - cut])
    with contextlib.suppress(DataLoss):
        assert decode_chunk(damaged, "abc").rows == 5


def test_an_empty_file_and_a_foreign_safetensors_file_are_no_chunks(tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.touch()
    with pytest.raises(DataLoss, match="empty is empty"):
        open_chunk(path)
    with pytest.raises(DataLoss, match="not a chunk"):
        decode_chunk(safetensors.numpy.save({"x": np.zeros(3)}))
