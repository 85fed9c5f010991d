"""How much memory a stored model takes in a process that predicts with it; no array library needed.

Measured as what a process grows by from before it reads the model until it has predicted: of large
forests 1.7 of their vector, of boosted trees, linear models and networks 1.0 to 1.1, of PyTorch
modules 3.3, of k-means 2.4, of a kernel machine with 100,000 vectors of 20 features 48.
"""

from __future__ import annotations

from math import prod

from phalanx.data.model_files import BLOCK_ROWS
from phalanx.layouts import ITEM_BYTES, size_bytes
from phalanx.needs import kind_of
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import Layout

COPIES = {
    "forest": 2,  # trees have their columns one by one as well
    "cascade": 2,  # and the squares of the support vectors
    "k_means": 2,  # and the centers with rows for columns
    "torch": 4,  # and a module with tensors of its own, and what it is loaded from
    "custom": 2,  # nobody knows what user code makes of it
}
"""Of the parameters, the file counted, which is read as a whole to compare its hash; else 1."""

ELEMENTS_MAX = 2**48
"""No machine has so many, and so what they take is a number that messages have room for."""

COMPARED_WITH = {"cascade": ("support_vectors", 4), "k_means": ("centers", 3)}
"""Tensors with each of whose rows all rows of a block are compared, and how many numbers that takes
for each pair."""


def model_bytes(spec: JobSpec, layout: Layout) -> int:
    """Return about how many bytes the model of a job takes.

    Raises KeyError for a vector of no known type, ValueError for tensors that are not its own.
    """
    shapes = {tensor.name: tensor.shape for tensor in layout.tensors}
    elements = [prod(shape) for shape in shapes.values() if min(shape, default=1) > 0]
    if not 0 < layout.element_count == sum(elements) <= ELEMENTS_MAX:
        raise ValueError(f"its tensors are not those of {layout.element_count} elements")
    kind = kind_of(spec)
    name, numbers = COMPARED_WITH.get(kind, ("", 0))
    compared = next(iter(shapes.get(name, ())), 0)
    pairs = BLOCK_ROWS * compared * numbers * ITEM_BYTES[layout.dtype]
    return COPIES.get(kind, 1) * size_bytes(layout) + pairs
