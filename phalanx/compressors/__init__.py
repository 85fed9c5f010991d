"""Compressors: fewer bytes on the wire, for less precision.

A vector is encoded block by block (`phalanx.frames.BLOCK_ELEMENTS`), each block by itself and to a
size that only depends on its number of elements. So a frame, which is whole blocks, can be cut out
of an encoded vector, and the result does not depend on frames or ranges. What is random is keyed by
what is encoded, so that a second computation of the same node gives the same bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from phalanx.compressors.base import (
    Array,
    Codec,
    Key,
    compress_in_place,
    decoded,
    encoded,
    encoded_span,
)
from phalanx.compressors.casts import Bfloat16, Float16
from phalanx.compressors.int8 import Int8
from phalanx.compressors.sign import Sign
from phalanx.compressors.sparse import TopK
from phalanx.errors import InvalidArgument
from phalanx.v1 import job_spec_pb2

__all__ = [
    "Array",
    "Codec",
    "Key",
    "build_down_codec",
    "build_up_codec",
    "compress_in_place",
    "decoded",
    "encoded",
    "encoded_span",
]

_CASTS: dict[str, type[Bfloat16 | Float16]] = {"bfloat16": Bfloat16, "float16": Float16}


def build_up_codec(spec: job_spec_pb2.JobSpec) -> Codec | None:
    """Return what contributions of a resolved spec are encoded with; None: sent as they are."""
    compression, dtype = spec.train.compression, np.dtype(spec.train.dtype or "float32")
    match compression.WhichOneof("up"):
        case None:
            return None
        case "cast_to":
            return _cast(compression.cast_to, dtype)
        case "int8":
            return Int8(dtype, compression.int8.bucket, spec.seed)
        case "top_k":
            return TopK(dtype, compression.top_k.fraction)
        case "sign":
            return Sign(dtype)
        case other:
            raise InvalidArgument(f"train.compression: {other!r} is not a compressor")


def build_down_codec(train: job_spec_pb2.Train) -> Codec | None:
    """Return what versions are encoded with on their way to the workers; None: sent as they are."""
    name = train.compression.down_cast_to
    return _cast(name, np.dtype(train.dtype or "float32")) if name else None


def _cast(name: str, dtype: np.dtype[Any]) -> Codec:
    if name not in _CASTS:
        raise InvalidArgument(f"train.compression: {name!r} is not a type to cast to")
    return _CASTS[name](dtype)
