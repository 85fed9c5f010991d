"""Arrays as the bytes of a task's result: safetensors, whose head says where each of them lies."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.errors import DataLoss

Array = NDArray[Any]
_LENGTH_BYTES = 8
_ALIGNMENT_BYTES = 64
_NAMES = {"F64": "<f8", "F32": "<f4", "I64": "<i8", "I32": "<i4", "U8": "|u1", "BOOL": "|b1"}
_CODES = {text.lstrip("<|"): name for name, text in _NAMES.items()}


@dataclass(frozen=True)
class Place:
    """Where an array stands in the bytes."""

    offset: int
    length: int
    shape: tuple[int, ...]


def pack(arrays: Mapping[str, Array], notes: Mapping[str, str] | None = None) -> bytes:
    """Return arrays by name as one piece of bytes; equal arrays in equal order give equal bytes.

    `notes` are kept with them, as text.
    """
    header: dict[str, Any] = {"__metadata__": dict(notes)} if notes else {}
    parts, offset = [], 0
    for name, array in arrays.items():
        code = _CODES[array.dtype.newbyteorder("<").str.lstrip("<|")]
        data = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
        header[name] = {
            "dtype": code,
            "shape": list(array.shape),
            "data_offsets": [offset, offset + len(data)],
        }
        parts.append(data)
        offset += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(_LENGTH_BYTES + len(text)) % _ALIGNMENT_BYTES)
    return b"".join([len(text).to_bytes(_LENGTH_BYTES, "little"), text, *parts])


def unpack(data: bytes | memoryview) -> dict[str, Array]:
    """Return the arrays that `pack` packed, read-only. Raises DataLoss for anything else."""
    header, body = _head(data)
    arrays: dict[str, Array] = {}
    try:
        for name, entry in header.items():
            if name != "__metadata__":
                first, stop = entry["data_offsets"]
                values = np.frombuffer(data[body + first : body + stop], _NAMES[entry["dtype"]])
                arrays[name] = values.reshape(entry["shape"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataLoss(f"the arrays of a result cannot be read: {error!r}") from error
    return arrays


def notes_of(data: bytes | memoryview) -> dict[str, str]:
    """Return the notes that were packed with arrays. Raises DataLoss for anything else."""
    notes = _head(data)[0].get("__metadata__", {})
    if not isinstance(notes, dict):
        raise DataLoss("the notes of a result cannot be read: they are no object")
    return notes


def places(data: bytes | memoryview) -> dict[str, Place]:
    """Return where each array stands in what `pack` returned."""
    header, body = _head(data)
    return {
        name: Place(
            body + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
            tuple(entry["shape"]),
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _head(data: bytes | memoryview) -> tuple[dict[str, Any], int]:
    """Return the head, and where the bytes of the arrays begin."""
    stop = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")
    try:
        header = json.loads(bytes(data[_LENGTH_BYTES:stop]))
    except (ValueError, RecursionError) as error:
        raise DataLoss(f"the arrays of a result cannot be read: {error!r}") from error
    if not isinstance(header, dict):
        raise DataLoss("the arrays of a result cannot be read: their head is no object")
    return header, stop
