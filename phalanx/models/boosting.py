"""Gradient-boosted trees: leaves add up histograms of gradients, of which the root makes splits.

Friedman, "Greedy function approximation" (2001); second derivatives and the gain as in Chen and
Guestrin, "XGBoost" (2016), section 2.2. All that is summed are integers below 2⁵³, held in float64:
so the sums are exact, and the same trees come out however the rows are cut into shards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.models.base import Array, Batch, DataSchema, LeafSums, TensorViews, make_layout
from phalanx.models.losses import Logistic, OutputLayer, Softmax, SquaredError
from phalanx.specs import workspaces
from phalanx.specs.workspaces import CELLS, EXPONENTS, MEASURES
from phalanx.v1 import job_spec_pb2

BASE, EDGES = "base", "edges"
"""(outputs,) scores before the first tree; (features, bins - 1) ends of the bins, then `NEVER`."""

NEVER = float(np.finfo(np.float64).max)
"""No value is greater."""

FEATURE, THRESHOLD, VALUE = "feature", "threshold", "value"
"""(trees, nodes) each, children of node i at 2 i + 1 and 2 i + 2. A row goes left where its feature
is at most the threshold; a feature of -1 makes a node an end, whose value counts."""

STAGE, TREE, LEVEL, SHIFT = range(4)
CURSOR, SUMS, GRID, SPREAD, CLASS_ROWS = "cursor", "sums", "grid", "spread", "class_rows"
"""Workspace. The cursor: which stage comes next, which tree and level, and the binary places of the
numbers that are summed (0: not known yet). Sums: histograms, or what the stage needs. The others
are of the first stage: rows in the cells of each feature, what cells are counted by (see
`DataSchema.spread`), and rows of each class (where there are classes)."""

SKETCH, CENTER, GROW = range(3)
"""Stages: where the values lie; the mean target, for numbers; levels of trees."""

LEAST_EXPONENT = -1073
"""Of the smallest number: the first of the `EXPONENTS`."""


@dataclass(frozen=True)
class Shape:
    """Sizes that the tensors follow from."""

    features: int
    outputs: int
    trees: int
    depth: int
    bins: int

    @property
    def nodes(self) -> int:
        """Places for nodes of one tree."""
        return (2 << self.depth) - 1


def shape_of(boosting: job_spec_pb2.Boosting, features: int, classes: int) -> Shape:
    """Return the sizes of a resolved job: with more than two classes each has its own trees."""
    outputs = classes if classes > 2 else 1
    return Shape(features, outputs, boosting.trees * outputs, boosting.depth, boosting.bins)


def places(rows: int, exponent: int = 0) -> int:
    """Return how many binary places numbers below 2^exponent can have for sums of so many rows."""
    return 52 - max(1, rows).bit_length() - exponent


def slope_shift(shift: int, classes: int) -> int:
    """Return the binary places of second derivatives: those of numbers are 1."""
    return shift if classes else 0


class Boosting:
    """Trees for classes (logistic, or softmax of several) or numbers (squared error)."""

    def __init__(self, schema: DataSchema, boosting: job_spec_pb2.Boosting) -> None:
        shape = shape_of(boosting, schema.features, schema.classes)
        size = (shape.trees, shape.nodes)
        tensors = [
            (BASE, (shape.outputs,), False),
            (EDGES, (shape.features, shape.bins - 1), False),
            *((name, size, False) for name in (FEATURE, THRESHOLD, VALUE)),
        ]
        workspace = workspaces.boosting(boosting, schema.features, schema.classes)
        workspace = workspace if schema.rows else {}
        self.layout = make_layout(tensors, schema.dtype, workspace=list(workspace.items()))
        self._shape = shape
        self._classes = schema.classes
        known = [np.array(each) for each in schema.spread]
        self._spread = known or [np.zeros(shape.features), np.ones(shape.features)]
        self._output: OutputLayer = SquaredError()
        if schema.classes:
            self._output = Logistic() if shape.outputs == 1 else Softmax()
        self.evaluation_sums = self._output.sums
        self._dtype = np.dtype(schema.dtype)
        self._views = TensorViews(self.layout)
        self._known: dict[int, _Rows] = {}

    def initial_parameters(self, seed: int) -> Array:
        """Return trees without splits, all of whose values are 0."""
        parameters = np.zeros(self.layout.element_count, self._dtype)
        self._views(parameters)[FEATURE][...] = -1
        return parameters

    def gradient(self, parameters: Array, batch: Batch, out: Array) -> LeafSums:
        """Contribute what the stage of the cursor asks for."""
        out[:] = 0
        tensors, sums = self._views(parameters), self._views(out)
        stage, tree = (int(tensors[CURSOR][each]) for each in (STAGE, TREE))
        if stage == SKETCH:
            self._sketch(batch, sums)
        elif stage == CENTER:
            shift = int(tensors[CURSOR][SHIFT])
            sums[SUMS][0] = np.rint(np.ldexp(batch.targets, shift)).sum()
        rows = self._rows_of(batch, tensors) if stage == GROW else None
        if rows is None:
            scores = np.zeros((batch.rows, self._shape.outputs)) + tensors[BASE]
        else:
            first = tree - tree % self._shape.outputs
            scores = rows.scores_of(tensors, min(first, self._shape.trees), self._shape.outputs)
        if rows is not None and tree < self._shape.trees:
            self._histogram(rows, scores, batch.targets, tensors, sums[SUMS])
        return LeafSums(batch.rows, self._output.residual(np.array(scores), batch.targets))

    def evaluate(self, parameters: Array, batch: Batch) -> NDArray[np.float64]:
        """See ``Model``."""
        return self._output.evaluate(self._scores(parameters, batch.features), batch.targets)

    def predict(self, parameters: Array, features: Any) -> Array:
        """See ``Model``."""
        return self._output.predict(self._scores(parameters, features))

    def _scores(self, parameters: Array, features: Any) -> Array:
        tensors = self._views(parameters)
        rows = dense(features)
        scores = np.zeros((len(rows), self._shape.outputs)) + tensors[BASE]
        for tree in range(self._shape.trees):
            splits, thresholds = tensors[FEATURE][tree], tensors[THRESHOLD][tree]
            if splits[0] < 0:
                scores[:, tree % self._shape.outputs] += tensors[VALUE][tree][0]
                continue
            node = np.zeros(len(rows), np.int64)
            for _ in range(self._shape.depth):
                feature = splits[node].astype(np.int64)
                right = rows[np.arange(len(rows)), feature] > thresholds[node]
                node = np.where(feature >= 0, 2 * node + 1 + right, node)
            scores[:, tree % self._shape.outputs] += tensors[VALUE][tree][node]
        return scores

    def _sketch(self, batch: Batch, sums: dict[str, Array]) -> None:
        """Count the values of each feature in cells, and classes or the exponents of targets."""
        mean, scale = self._spread
        values = (dense(batch.features) - mean) * scale
        # From all numbers to (-1, 1), most finely around 0; each step is one exact operation's.
        inside = values / (1 + np.abs(values))
        cells = np.clip(((inside + 1) * (CELLS / 2)).astype(np.int64), 0, CELLS - 1)
        for feature in range(self._shape.features):
            sums[GRID][feature] = np.bincount(cells[:, feature], minlength=CELLS)
        if batch.shard == 0:
            sums[SPREAD][...] = self._spread
        if self._classes:
            sums[CLASS_ROWS][...] = np.bincount(batch.targets, minlength=self._classes)
        else:
            _, exponents = np.frexp(batch.targets[batch.targets != 0])
            counts = np.bincount(exponents - LEAST_EXPONENT, minlength=EXPONENTS)
            sums[SUMS][:EXPONENTS] = counts

    def _rows_of(self, batch: Batch, tensors: dict[str, Array]) -> _Rows:
        """The rows of a shard, which are the same in every step, in bins."""
        known = self._known.get(batch.shard)
        if known is None or not np.array_equal(known.edges, tensors[EDGES]):
            values, edges = dense(batch.features), np.array(tensors[EDGES])
            bins = np.empty(values.shape, np.uint8)
            for feature, ends in enumerate(edges):
                bins[:, feature] = np.searchsorted(ends, values[:, feature])
            known = self._known[batch.shard] = _Rows(edges, bins)
        return known

    def _histogram(
        self,
        rows: _Rows,
        scores: Array,
        targets: Array,
        tensors: dict[str, Array],
        out: Array,
    ) -> None:
        """Write (measures, nodes of the level, features, bins) sums of the rows."""
        shape, shift = self._shape, int(tensors[CURSOR][SHIFT])
        tree, level = (int(tensors[CURSOR][each]) for each in (TREE, LEVEL))
        first, slope = self._derivatives(scores, targets, tree % shape.outputs)
        node = rows.nodes(tensors[FEATURE][tree], tensors[THRESHOLD][tree], level)
        place = node - (2**level - 1)
        there = place >= 0  # the others are in an end of an earlier level
        place, bins = place[there], rows.bins[there]
        weights = [
            np.rint(np.ldexp(first[there], shift)),
            np.rint(np.ldexp(slope[there], slope_shift(shift, self._classes))),
        ]
        size, cells = 2**level, shape.features * shape.bins
        found = out[: MEASURES * size * cells].reshape(MEASURES, size, shape.features, shape.bins)
        for feature in range(shape.features):
            index = place * shape.bins + bins[:, feature]
            for measure, weight in enumerate((*weights, None)):
                counted = np.bincount(index, weight, minlength=size * shape.bins)
                found[measure, :, feature] = counted.reshape(size, shape.bins)

    def _derivatives(self, scores: Array, targets: Array, output: int) -> tuple[Array, Array]:
        """First and second derivatives of the loss of each row by one of its scores."""
        if not self._classes:
            return scores[:, 0] - targets, np.ones(len(targets))
        chosen = output if self._shape.outputs > 1 else 1
        probability = self._output.predict(np.array(scores))[:, chosen]
        return probability - (targets == chosen), probability * (1 - probability)


class _Rows:
    """Rows of one shard in bins, and their scores after so many trees, which later ones add to."""

    def __init__(self, edges: Array, bins: NDArray[np.uint8]) -> None:
        self.edges = edges
        self.bins = bins
        self._trees = 0
        self._scores: Array | None = None
        self._seen: list[Array] = []

    def scores_of(self, tensors: dict[str, Array], trees: int, outputs: int) -> Array:
        """Scores by the first ``trees`` trees; what is remembered is only used where they are the
        same."""
        grown = [tensors[name] for name in (FEATURE, THRESHOLD, VALUE)]
        same = self._trees <= trees and all(
            np.array_equal(seen, now[: self._trees])
            for seen, now in zip(self._seen, grown, strict=False)
        )
        if self._scores is None or not same:
            self._scores = np.zeros((len(self.bins), outputs)) + tensors[BASE]
            self._trees = 0
        if self._trees < trees:
            for tree in range(self._trees, trees):
                splits, thresholds, values = (each[tree] for each in grown)
                depth = (len(splits) + 1).bit_length() - 2
                node = self.nodes(splits, thresholds, depth)
                self._scores[:, tree % outputs] += values[node]
            self._trees = trees
            self._seen = [np.array(each[:trees]) for each in grown]
        return self._scores

    def nodes(self, splits: Array, thresholds: Array, levels: int) -> NDArray[np.int64]:
        """The node that each row is in after so many levels of a tree."""
        node = np.zeros(len(self.bins), np.int64)
        last_left = np.zeros(len(splits), np.int64)
        for each in np.flatnonzero(splits >= 0):
            last_left[each] = np.searchsorted(self.edges[int(splits[each])], thresholds[each])
        every = np.arange(len(node))
        for _ in range(levels):
            feature = splits[node].astype(np.int64)
            right = self.bins[every, feature] > last_left[node]
            node = np.where(feature >= 0, 2 * node + 1 + right, node)
        return node


def dense(features: Any) -> Array:
    """Rows as an array."""
    array: Array = features if isinstance(features, np.ndarray) else features.toarray()
    return array
