"""What of a job's vector becomes its model, and its size; no array library needed."""

from __future__ import annotations

from math import prod

from phalanx.v1.training_pb2 import Layout

ITEM_BYTES = {"float32": 4, "float64": 8}
"""Types of a vector."""


def size_bytes(layout: Layout) -> int:
    """Return the bytes of a vector."""
    return layout.element_count * ITEM_BYTES[layout.dtype]


def model_layout(layout: Layout) -> Layout:
    """Return the layout without the workspace, which stands at the end of the vector."""
    tensors = [each for each in layout.tensors if not each.workspace]
    count = sum(prod(each.shape) for each in tensors)
    return Layout(tensors=tensors, dtype=layout.dtype, element_count=count)
