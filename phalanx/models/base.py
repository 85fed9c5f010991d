"""What a model is: the mathematics of one leaf, and nothing of its distribution.

Vectors are flat: the tensors of the layout one after another, C order. A gradient is the *sum*
over the rows of a leaf; dividing happens once, at the root of the tree.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from phalanx.errors import InvalidArgument, Unavailable
from phalanx.layouts import ITEM_BYTES
from phalanx.streams import Stream, stream_generator
from phalanx.v1.training_pb2 import Layout, TensorSpec

if TYPE_CHECKING:
    from scipy.sparse import csr_array

Array = NDArray[Any]


class DeviceLost(Unavailable):
    """What a model computes on has failed: this process is of no use any more, another may be."""

    def __init__(self, message: str) -> None:
        super().__init__(message, reason="DEVICE_LOST")


@dataclass(frozen=True)
class Batch:
    """The rows of one leaf.

    Attributes:
        features: (rows, features) in the dtype of the parameters; dense C order or CSR.
        targets: (rows,) int64 class indices, or the regression targets in the same dtype.
        weights: (rows,) what each row counts in loss and gradient, in the same dtype; None: 1.
        shard: whose rows they are.
        positions: (rows,) int64 numbers of the rows among all that the job trains on, in the order
            in which shards are cut; None where the job's algorithm does not ask for them.
        key: (seed of the job, shard, step of the shard) of a training leaf. What a model draws by
            chance it draws from this, so that every worker draws the same.
    """

    features: Array | csr_array
    targets: Array
    weights: Array | None = None
    shard: int = 0
    positions: NDArray[np.int64] | None = None
    key: tuple[int, int, int] | None = None

    @property
    def rows(self) -> int:
        """Number of rows."""
        return int(self.targets.shape[0])


@dataclass(frozen=True)
class DataSchema:
    """What a model needs to know of the data: ``classes`` is 0 for regression.

    ``rows`` and ``shards`` are those that the job trains on; 0 where a model that is there already
    is loaded: then it has no workspace. ``batch_rows`` are those of a step of one shard, at most.
    ``features_of_shards`` says where shards are groups of columns which features each sees.
    ``spread`` has the mean of each feature as leaves see it, and what makes its deviation 1, for
    models that ask for it; empty where they are not known.
    """

    features: int
    classes: int
    dtype: str = "float32"
    rows: int = 0
    shards: int = 0
    batch_rows: int = 0
    features_of_shards: tuple[tuple[range, ...], ...] = ()
    spread: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True)
class LeafSums:
    """Example count and loss sum of one leaf."""

    count: int
    loss_sum: float


class Model(Protocol):
    """The functions of one job, for one thread at a time.

    All are pure: equal arguments give equal bits.
    """

    @property
    def layout(self) -> Layout:
        """Names, shapes and order of the parameters."""

    @property
    def evaluation_sums(self) -> tuple[str, ...]:
        """Names of the sums that ``evaluate`` returns; see ``phalanx.training.metrics``."""

    def initial_parameters(self, seed: int) -> Array:
        """Return version 0, flat, keyed by seed and tensor."""

    def gradient(self, parameters: Array, batch: Batch, out: Array) -> LeafSums:
        """Write the gradient of the summed loss into all of ``out``; return count and loss sum.

        In the places of a buffer stands what it becomes, times the count.
        """

    def evaluate(self, parameters: Array, batch: Batch) -> NDArray[np.float64]:
        """Return the sums over the rows, in the order of ``evaluation_sums``."""

    def predict(self, parameters: Array, features: Any) -> Array:
        """Return (rows, classes) probabilities; (rows,) values for a regression.

        Of two classes without probabilities (rows,) decision values: the second class above 0.
        """


@runtime_checkable
class ClippingModel(Protocol):
    """A model that shortens the gradients of its rows without computing one after the other."""

    def clipped_gradient(
        self, parameters: Array, batch: Batch, clip_norm: float, out: Array
    ) -> None:
        """Write the sum of the rows' gradients, each of a norm of ``clip_norm`` at most, into all
        of ``out``. A row whose gradient is not finite counts as 0."""


class Predictor(Protocol):
    """What predicts with trained parameters: every `Model`, and forests."""

    @property
    def layout(self) -> Layout:
        """Names, shapes and order of the parameters."""

    def predict(self, parameters: Array, features: Any) -> Array:
        """Return (rows, classes) probabilities, or (rows,) values for a regression."""


def make_layout(
    tensors: Sequence[tuple[str, Sequence[int], bool]],
    dtype: str,
    *,
    workspace: Sequence[tuple[str, Sequence[int]]] = (),
    buffers: Collection[str] = (),
) -> Layout:
    """Return the layout of named tensors (name, shape, whether L2 and weight decay apply).

    ``workspace`` are those that a job needs while it trains and its model leaves out. ``buffers``
    names those for which no gradient comes; see ``TensorSpec.buffer``.

    Raises InvalidArgument for a dtype, name or shape that cannot be.
    """
    if dtype not in ITEM_BYTES:
        raise InvalidArgument(f"dtype {dtype!r} is not one of {', '.join(ITEM_BYTES)}")
    named = [*((name, shape) for name, shape, _ in tensors), *workspace]
    names = [name for name, _ in named]
    if not names or len(set(names)) != len(names) or not all(names):
        raise InvalidArgument(f"a model needs tensors with distinct names, not {names}")
    for name, shape in named:
        if any(size < 1 for size in shape):
            raise InvalidArgument(f"tensor {name!r} has the shape {tuple(shape)}; sizes start at 1")
    specs = [
        TensorSpec(name=name, shape=shape, decay=decay, buffer=name in buffers)
        for name, shape, decay in tensors
    ]
    specs += [TensorSpec(name=name, shape=shape, workspace=True) for name, shape in workspace]
    count = sum(prod(shape) for _, shape in named)
    return Layout(tensors=specs, dtype=dtype, element_count=count)


def dense(features: Any) -> Array:
    """Return rows, which may be sparse, as a dense array; dense ones are not copied."""
    array: Array = features if isinstance(features, np.ndarray) else features.toarray()
    return array


def tensor_size(tensor: TensorSpec) -> int:
    """Return the number of elements of a tensor."""
    return prod(tensor.shape)


class TensorViews:
    """Cuts flat vectors of one layout into named tensors, without copies."""

    def __init__(self, layout: Layout) -> None:
        self._cuts: list[tuple[str, slice, tuple[int, ...]]] = []
        first = 0
        for tensor in layout.tensors:
            stop = first + tensor_size(tensor)
            self._cuts.append((tensor.name, slice(first, stop), tuple(tensor.shape)))
            first = stop

    def __call__(self, vector: Array) -> dict[str, Array]:
        """Return the tensors of a vector as views, by name."""
        return {name: vector[cut].reshape(shape) for name, cut, shape in self._cuts}


def views(layout: Layout, vector: Array) -> dict[str, Array]:
    """Return the tensors of a flat vector as views, by name; `TensorViews` is for many vectors."""
    return TensorViews(layout)(vector)


def decay_mask(
    layout: Layout, first: int = 0, count: int | None = None
) -> NDArray[np.bool_] | None:
    """Return where L2 and weight decay act, of all elements or of some; None: nowhere."""
    return _mask(layout, [spec.decay for spec in layout.tensors], first, count)


def buffer_mask(
    layout: Layout, first: int = 0, count: int | None = None
) -> NDArray[np.bool_] | None:
    """Return where buffers are, of all elements or of some; None: nowhere."""
    return _mask(layout, [spec.buffer for spec in layout.tensors], first, count)


def frame_masks(
    mask: NDArray[np.bool_] | None, grid: Sequence[tuple[int, int]]
) -> list[NDArray[np.bool_] | None]:
    """Cut a mask into frames of (first element, count); None where nothing is marked."""
    if mask is None:
        return [None] * len(grid)
    frames = [mask[first : first + count] for first, count in grid]
    return [frame if frame.any() else None for frame in frames]


def _mask(
    layout: Layout, marked: Sequence[bool], first: int, count: int | None
) -> NDArray[np.bool_] | None:
    mask = np.zeros(layout.element_count if count is None else count, np.bool_)
    position = -first
    for mark, tensor in zip(marked, layout.tensors, strict=True):
        size = tensor_size(tensor)
        if mark:
            mask[max(position, 0) : max(position + size, 0)] = True
        position += size
    return mask if mask.any() else None


def keyed_normal(seed: int, tensor: int, count: int) -> NDArray[np.float64]:
    """Return standard normal numbers keyed by (seed, tensor index): the same on every machine."""
    return stream_generator(seed, Stream.PARAMETERS, (0, tensor, 0)).standard_normal(count)
