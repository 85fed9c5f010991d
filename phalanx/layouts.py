"""What of a job's vector becomes its model, and its size; no array library needed."""

from __future__ import annotations

from math import prod

from phalanx.errors import InvalidArgument
from phalanx.texts import number_of
from phalanx.v1.coordination_service_pb2 import JobDescribed
from phalanx.v1.training_pb2 import Layout

ITEM_BYTES = {"float32": 4, "float64": 8}
"""Types of a vector."""

DESCRIPTION_BYTES_MAX = 1024 * 1024
"""Each term of a job journals its layout, and each of its workers is told it in one message."""


def size_bytes(layout: Layout) -> int:
    """Return the bytes of a vector."""
    return layout.element_count * ITEM_BYTES[layout.dtype]


def check_description(described: JobDescribed) -> None:
    """Refuse what a worker says of a job's model if it is too long to be kept and handed on.

    Raises InvalidArgument (DESCRIPTION_TOO_LONG).
    """
    size = described.ByteSize()
    if size > DESCRIPTION_BYTES_MAX:
        tensors = number_of(len(described.layout.tensors), "tensor")
        sums = number_of(len(described.evaluation_sums), "evaluation sum")
        raise InvalidArgument(
            f"the description of the model, with the names and shapes of {tensors} and {sums}, has "
            f"{size:,} bytes; at most {DESCRIPTION_BYTES_MAX:,} are taken: keep the parameters in "
            "fewer tensors, or give them shorter names",
            reason="DESCRIPTION_TOO_LONG",
        )


def model_layout(layout: Layout) -> Layout:
    """Return the layout without the workspace, which stands at the end of the vector."""
    tensors = [each for each in layout.tensors if not each.workspace]
    count = sum(prod(each.shape) for each in tensors)
    return Layout(tensors=tensors, dtype=layout.dtype, element_count=count)
