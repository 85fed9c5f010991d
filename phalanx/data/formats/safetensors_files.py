"""Safetensors files: a tensor of features and one of targets, mapped and read in pieces."""

import functools
import json
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.data.formats.arrays import (
    PairInFile,
    array_where,
    batch_rows,
    check_rows,
    flat_width,
    target_values,
)
from phalanx.data.options import IngestOptions
from phalanx.data.sources import ArrayBatch
from phalanx.data.wording import option
from phalanx.errors import InvalidArgument, NotFound
from phalanx.texts import number_of

_FEATURE_KEYS = ("features", "X", "x", "data")
_TARGET_KEYS = ("targets", "target", "y", "Y", "labels", "label")
_DTYPES = {
    "BOOL": "bool",
    "U8": "u1",
    "I8": "i1",
    "U16": "<u2",
    "I16": "<i2",
    "U32": "<u4",
    "I32": "<i4",
    "U64": "<u8",
    "I64": "<i8",
    "F16": "<f2",
    "F32": "<f4",
    "F64": "<f8",
}


class SafetensorsArrays(PairInFile):
    """One pair of tensors of a file."""

    def __init__(self, path: Path, options: IngestOptions) -> None:
        tensors, body = _header(path)
        features_key = options.features_key or _usual(tensors, _FEATURE_KEYS, "features", path)
        target_key = options.target_key or _usual(tensors, _TARGET_KEYS, "target", path)
        for key in (features_key, target_key):
            if key not in tensors:
                raise InvalidArgument(
                    f"{path.name} has no tensor {key!r}; it has {', '.join(tensors)}"
                )
        super().__init__(path, features_key, target_key)
        features, targets = (
            _tensor(body, key, tensors[key], path) for key in (features_key, target_key)
        )
        width = flat_width(features.shape, path.name, f"{features_key!r}")
        check_rows(len(features), targets.shape[0] if targets.ndim else 0, path.name)
        self._features = features.reshape(len(features), width)
        self._targets = targets
        self._describe(width, features.dtype, targets.dtype)

    def batches(self) -> Iterator[ArrayBatch]:
        """All rows in order."""
        rows, width = self._features.shape
        step = batch_rows(width, self._features.dtype.itemsize)
        for first in range(0, rows, step):
            yield ArrayBatch(
                features=self._features[first : first + step],
                targets=target_values(self._targets[first : first + step], self._path.name),
                where=functools.partial(array_where, self._path.name, first),
            )


def _usual(tensors: Mapping[str, Any], candidates: tuple[str, ...], what: str, path: Path) -> str:
    found = [key for key in candidates if key in tensors]
    if not found:
        raise InvalidArgument(
            f"{path.name} has the tensors {', '.join(tensors)}; say which one "
            f"holds the {what} with {option(f'{what}_key')}"
        )
    return found[0]


def _header(path: Path) -> tuple[dict[str, Any], memoryview]:
    """What the file says of its tensors, and the bytes of all of them, mapped."""
    try:
        if path.stat().st_size <= 8:
            raise ValueError("it is too short")
        with path.open("rb") as file:
            view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        header_bytes = int.from_bytes(view[:8], "little")
        if not 0 < header_bytes <= len(view) - 8:
            raise ValueError("it does not start with the length of a header")
        header = _described(bytes(view[8 : 8 + header_bytes]))
        body = view[8 + header_bytes :]
        end = 0
        for key, entry in header.items():
            first, stop = entry["data_offsets"]
            if not 0 <= first <= stop <= len(body):
                raise ValueError(f"tensor {key!r} reaches past the end of the file")
            end = max(end, stop)
        if end != len(body):
            raise ValueError(f"its last {number_of(len(body) - end, 'byte')} belong to no tensor")
    except FileNotFoundError as error:
        raise NotFound(f"there is no file {path}") from error
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise _no_safetensors(path, error) from error
    if not header:
        raise InvalidArgument(f"{path.name} holds no tensors")
    return header, body


def _described(text: bytes) -> dict[str, Any]:
    """The tensors that a header tells of."""
    try:
        header = json.loads(text)
    except ValueError as error:
        raise ValueError("its header is no JSON") from error
    if not isinstance(header, dict) or not all(
        key == "__metadata__" or (isinstance(entry, dict) and "data_offsets" in entry)
        for key, entry in header.items()
    ):
        raise ValueError("its header does not describe tensors")
    header.pop("__metadata__", None)
    return header


def _tensor(body: memoryview, key: str, entry: Any, path: Path) -> NDArray[Any]:
    try:
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            raise InvalidArgument(
                f"{path.name}: tensor {key!r} has type {entry['dtype']}; those that can be read "
                f"are {', '.join(_DTYPES)}"
            )
        first, stop = entry["data_offsets"]
        return np.frombuffer(body[first:stop], dtype=dtype).reshape(entry["shape"])
    except (ValueError, KeyError, TypeError) as error:
        raise _no_safetensors(path, error) from error


def _no_safetensors(path: Path, error: Exception) -> InvalidArgument:
    return InvalidArgument(f"{path.name} is not a safetensors file, or is damaged: {error}")
