"""The linear SVM by its dual problem: what the leaves of a CoCoA+ job compute.

Beside the weights the vector holds the dual variable of every row. A leaf changes those of its own
rows and says by how much, and what that changes in the weights; since nobody else has written
there, the sum over all leaves is the change of the whole (see ``phalanx.models.ascent``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.models.ascent import ascend
from phalanx.models.base import Array, Batch, DataSchema, LeafSums, TensorViews, make_layout
from phalanx.models.linear import WEIGHTS
from phalanx.models.losses import Hinge
from phalanx.specs import workspaces
from phalanx.specs.catalog import CERTIFICATES
from phalanx.streams import Stream, stream_generator
from phalanx.v1.job_spec_pb2 import Cocoa

DUALS, ROUNDS = "duals", "rounds"
"""Workspace: (rows,) α, and one element: the rounds that are over."""


class DualSvm:
    """Hinge loss, no bias. P, D and α are those of ``phalanx.models.ascent``.

    ``certified``: evaluations are over the rows that the job trains on. Then each has the primal
    and the dual value and their difference, which bounds how far P is from its minimum.
    """

    def __init__(
        self, schema: DataSchema, cocoa: Cocoa, l2: float, seed: int, *, certified: bool
    ) -> None:
        workspace = list(workspaces.cocoa(schema.rows).items())
        tensors = [(WEIGHTS, (schema.features,), True)]
        self.layout = make_layout(tensors, schema.dtype, workspace=workspace)
        self._hinge = Hinge(squared=False)
        self._certified = certified
        self.evaluation_sums = (*self._hinge.sums, *(CERTIFICATES if certified else ()))
        self._l2 = l2
        self._scale = l2 * schema.rows
        self._sigma = cocoa.sigma
        self._passes = cocoa.local_passes
        self._seed = seed
        self._dtype = np.dtype(schema.dtype)
        self._views = TensorViews(self.layout)

    def initial_parameters(self, seed: int) -> Array:
        """Return zeros, where w is that of α."""
        return np.zeros(self.layout.element_count, self._dtype)

    def gradient(self, parameters: Array, batch: Batch, out: Array) -> LeafSums:
        """Write the changes of this shard; the loss is that of the weights before."""
        assert batch.positions is not None, "the job's leaves number their rows"
        now, change = self._views(parameters), self._views(out)
        loss = self._hinge.evaluate(self._scores(parameters, batch.features), batch.targets)[0]
        signs = (2 * batch.targets - 1).astype(self._dtype)
        before = now[DUALS][batch.positions]
        orders = self._orders(batch, int(now[ROUNDS][0]))
        curvature = self._sigma / self._scale
        after = ascend(batch.features, signs, before, now[WEIGHTS], curvature, orders)
        moved = after.astype(self._dtype) - before
        out[:] = 0
        change[DUALS][batch.positions] = moved
        change[WEIGHTS][...] = batch.features.T @ (signs * moved)
        np.divide(change[WEIGHTS], self._dtype.type(self._scale), out=change[WEIGHTS])
        return LeafSums(batch.rows, float(loss))

    def evaluate(self, parameters: Array, batch: Batch) -> NDArray[np.float64]:
        """See ``Model``; what is the same for all rows counts for each of them."""
        sums = self._hinge.evaluate(self._scores(parameters, batch.features), batch.targets)
        if not self._certified:
            return sums
        tensors = self._views(parameters)
        weights = tensors[WEIGHTS].astype(np.float64)
        penalty = self._l2 / 2 * float(np.square(weights).sum())
        primal = float(sums[0]) + batch.rows * penalty
        dual = batch.rows * (float(tensors[DUALS].mean(dtype=np.float64)) - penalty)
        return np.array([*sums, primal, dual, primal - dual], np.float64)

    def predict(self, parameters: Array, features: Any) -> Array:
        """Return (rows,) decision values."""
        return self._hinge.predict(self._scores(parameters, features))

    def _scores(self, parameters: Array, features: Any) -> Array:
        scores: Array = features @ self._views(parameters)[WEIGHTS]
        return scores[:, np.newaxis]

    def _orders(self, batch: Batch, rounds_over: int) -> Iterator[NDArray[np.int64]]:
        """The order of the rows in each pass, keyed by shard, round and pass."""
        for number in range(self._passes):
            counter = (number, batch.shard, rounds_over)
            yield stream_generator(self._seed, Stream.DUALS, counter).permutation(batch.rows)
