"""Chunks: blocks of rows as safetensors files that are mapped, not loaded.

A dense chunk holds ``targets`` (rows) and ``features`` (rows by features, C order). A CSR chunk
holds ``targets``, ``indptr`` (rows + 1) and ``indices`` as int32, and ``data``. Wider types come
first, so that every tensor lies on a multiple of its item size. Any safetensors reader opens these
files; the writer and reader here exist because the bytes must be the same everywhere (the digest is
the name) and because opening must neither copy nor read the data.
"""

import json
import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.data.chunk_layout import (
    CHUNK_LIMIT_BYTES,
    NAME_OF_DTYPE,
    TensorShape,
    head_of,
    in_order,
)
from phalanx.errors import DataLoss, InvalidArgument
from phalanx.texts import number_of

_HEADER_LIMIT_BYTES = 64 * 1024
_DTYPE_OF_NAME = {name: np.dtype(dtype) for dtype, name in NAME_OF_DTYPE.items()}


@dataclass(frozen=True)
class DenseChunk:
    """Mapped rows: ``features`` is rows by features; all arrays are read-only."""

    features: NDArray[Any]
    targets: NDArray[Any]

    @property
    def rows(self) -> int:
        """How many rows."""
        return int(self.targets.shape[0])


@dataclass(frozen=True)
class CsrChunk:
    """Mapped sparse rows: row i has ``data[indptr[i]:indptr[i + 1]]`` in columns ``indices[…]``."""

    data: NDArray[Any]
    indices: NDArray[np.int32]
    indptr: NDArray[np.int32]
    targets: NDArray[Any]

    @property
    def rows(self) -> int:
        """How many rows."""
        return int(self.targets.shape[0])


def encode_dense(features: NDArray[Any], targets: NDArray[Any]) -> bytes:
    """A dense chunk: rows by features of uint8, float32 or float64, and one target per row.

    Raises InvalidArgument for other shapes and types, and for more than ``CHUNK_LIMIT_BYTES``.
    """
    if features.ndim != 2 or targets.shape != features.shape[:1]:
        raise InvalidArgument(
            f"a dense chunk takes rows by features and one target per row, "
            f"not shapes {features.shape} and {targets.shape}"
        )
    return _encode({"targets": targets, "features": features}, "dense")


def encode_csr(
    data: NDArray[Any], indices: NDArray[Any], indptr: NDArray[Any], targets: NDArray[Any]
) -> bytes:
    """A CSR chunk; ``indptr`` starts at 0 and has one entry more than there are targets.

    Raises InvalidArgument for other shapes and types, and for more than ``CHUNK_LIMIT_BYTES``.
    """
    rows = targets.shape[0]
    if indptr.shape != (rows + 1,) or indptr[0] != 0 or indptr[-1] != data.shape[0]:
        raise InvalidArgument(
            f"a CSR chunk of {number_of(rows, 'row')} takes {rows + 1} row starts from 0 to "
            f"{data.shape[0]}"
        )
    if indices.shape != data.shape:
        raise InvalidArgument(
            f"a CSR chunk takes one index per value, not {indices.shape[0]} for {data.shape[0]}"
        )
    tensors = {
        "targets": targets,
        "data": data,
        "indices": indices.astype(np.int32, copy=False),
        "indptr": indptr.astype(np.int32, copy=False),
    }
    return _encode(tensors, "csr")


def open_chunk(path: Path) -> DenseChunk | CsrChunk:
    """Maps a chunk file. Pages are read when rows are; the map lives as long as its arrays do.

    Raises DataLoss when the file is not a whole chunk.
    """
    with path.open("rb") as file:
        try:
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:
            raise DataLoss(f"chunk {path.name} is empty") from error
    return decode_chunk(memoryview(buffer), path.name)


def decode_chunk(buffer: memoryview | bytes, name: str = "chunk") -> DenseChunk | CsrChunk:
    """A chunk over its bytes, without copying them; ``name`` is for messages.

    Raises DataLoss when the bytes are not a whole chunk.
    """
    view = memoryview(buffer)
    try:
        tensors, kind = _decode(view)
        if kind == "dense":
            dense = DenseChunk(features=tensors["features"], targets=tensors["targets"])
            if dense.features.ndim != 2 or dense.features.shape[0] != dense.rows:
                raise ValueError("features and targets differ in rows")
            return dense
        if kind != "csr":
            raise ValueError(f"unknown kind {kind!r}")
        chunk = CsrChunk(
            data=tensors["data"],
            indices=tensors["indices"],
            indptr=tensors["indptr"],
            targets=tensors["targets"],
        )
        if chunk.indptr.shape != (chunk.rows + 1,) or chunk.indptr[-1] != chunk.data.shape[0]:
            raise ValueError("row starts do not fit the values")
        return chunk
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataLoss(f"{name} is not a chunk of a data set: {error}") from error


def _encode(tensors: Mapping[str, NDArray[Any]], kind: str) -> bytes:
    for name, tensor in tensors.items():
        if tensor.dtype.name not in NAME_OF_DTYPE:
            raise InvalidArgument(
                f"{name} of a chunk cannot be {tensor.dtype.name}; use {', '.join(NAME_OF_DTYPE)}"
            )
    shapes = [TensorShape(name, each.dtype.name, each.shape) for name, each in tensors.items()]
    head, size_bytes = head_of(shapes, kind)
    if size_bytes > CHUNK_LIMIT_BYTES:
        raise InvalidArgument(
            f"a chunk of {size_bytes} bytes is over the limit of {CHUNK_LIMIT_BYTES}; "
            "use fewer rows"
        )
    parts = (tensors[shape.name] for shape in in_order(shapes))
    return b"".join((head, *(_little_endian(part) for part in parts)))


def _little_endian(tensor: NDArray[Any]) -> bytes:
    return np.ascontiguousarray(tensor, dtype=tensor.dtype.newbyteorder("<")).tobytes()


def _decode(view: memoryview) -> tuple[dict[str, NDArray[Any]], str]:
    if len(view) < 8:
        raise ValueError("too short for a header")
    header_bytes = int.from_bytes(view[:8], "little")
    if header_bytes > min(_HEADER_LIMIT_BYTES, len(view) - 8):
        raise ValueError("its header is longer than the file")
    header = json.loads(bytes(view[8 : 8 + header_bytes]))
    kind = header.pop("__metadata__")["kind"]
    body = view[8 + header_bytes :]
    tensors: dict[str, NDArray[Any]] = {}
    end = 0
    for name, entry in header.items():
        first, stop = entry["data_offsets"]
        shape = tuple(entry["shape"])
        dtype = _DTYPE_OF_NAME[entry["dtype"]]
        count = math.prod(shape)
        if not 0 <= first <= stop <= len(body) or stop - first != count * dtype.itemsize:
            raise ValueError(f"{name} does not fit the file")
        flat = np.frombuffer(body, dtype=dtype, count=count, offset=first)
        tensors[name] = flat.reshape(shape)
        end = max(end, stop)
    if end != len(body):
        raise ValueError("bytes are left over")
    return tensors, kind
