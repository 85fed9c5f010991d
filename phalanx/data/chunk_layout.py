"""How long a chunk is and what its header says, by the shapes of what it holds.

Apart from the code that fills chunks, so that a service can tell without an array library.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from phalanx.data.manifest import ChunkInfo, DatasetManifest

CHUNK_LIMIT_BYTES = 16 * 1024 * 1024
"""No chunk is larger than this."""

HEADER_ALIGNMENT_BYTES = 64

NAME_OF_DTYPE = {"uint8": "U8", "int32": "I32", "int64": "I64", "float32": "F32", "float64": "F64"}
_ITEM_BYTES = {"uint8": 1, "int32": 4, "int64": 8, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class TensorShape:
    """One tensor of a chunk; ``dtype`` is NumPy's name of it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def item_bytes(self) -> int:
        """The size of one value."""
        return _ITEM_BYTES[self.dtype]


def in_order(tensors: Sequence[TensorShape]) -> list[TensorShape]:
    """Return them as they lie in a chunk: wider types first, so that each lies on a multiple."""
    return sorted(tensors, key=lambda each: (-each.item_bytes, each.name))


def head_of(tensors: Sequence[TensorShape], kind: str) -> tuple[bytes, int]:
    """Return what is before the tensors of a chunk, and the size of all of it.

    Raises KeyError for a dtype that no chunk has.
    """
    header: dict[str, Any] = {"__metadata__": {"phalanx": "chunk/1", "kind": kind}}
    offset = 0
    for tensor in in_order(tensors):
        end = offset + prod(tensor.shape) * tensor.item_bytes
        header[tensor.name] = {
            "dtype": NAME_OF_DTYPE[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % HEADER_ALIGNMENT_BYTES)
    return len(text).to_bytes(8, "little") + text, 8 + len(text) + offset


def size_of(chunk: ChunkInfo, manifest: DatasetManifest) -> int:
    """Return how long a chunk of a data set is by its rows. Raises KeyError as ``head_of`` does."""
    target = "int64" if manifest.task == "classification" else "float64"
    tensors = [TensorShape("targets", target, (chunk.rows,))]
    if manifest.format == "dense":
        shape = (chunk.rows, manifest.features)
        tensors.append(TensorShape("features", manifest.dtype, shape))
    else:
        tensors += [
            TensorShape("data", manifest.dtype, (chunk.nonzeros,)),
            TensorShape("indices", "int32", (chunk.nonzeros,)),
            TensorShape("indptr", "int32", (chunk.rows + 1,)),
        ]
    return head_of(tensors, manifest.format)[1]
