"""What is in a part of a checkpoint: flat vectors by name, in a safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

PARAMETERS = "parameters"
HEADER_LIMIT_BYTES = 1024 * 1024

_DTYPES = {"F32": "<f4", "F64": "<f8"}


def parse_part(data: bytes) -> tuple[Array, Mapping[str, Array]]:
    """Return (parameters, the other vectors) of a part as views; raises ValueError and the like."""
    length = int.from_bytes(data[:8], "little")
    if not 2 <= length <= min(HEADER_LIMIT_BYTES, len(data) - 8):
        raise ValueError("its header does not fit")
    table: dict[str, Any] = json.loads(data[8 : 8 + length])
    table.pop("__metadata__", None)
    vectors = {name: _vector(data, 8 + length, entry) for name, entry in table.items()}
    parameters = vectors.pop(PARAMETERS)
    return parameters, vectors


def _vector(data: bytes, start: int, entry: Mapping[str, Any]) -> Array:
    dtype = np.dtype(_DTYPES[entry["dtype"]])
    first, stop = entry["data_offsets"]
    (count,) = entry["shape"]
    if not 0 <= first <= stop <= len(data) - start or stop - first != count * dtype.itemsize:
        raise ValueError("a tensor lies outside of it")
    return np.frombuffer(data, dtype, count, start + first)
