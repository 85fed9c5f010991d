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

from phalanx.models.base import (
    Array,
    Batch,
    DataSchema,
    LeafSums,
    TensorViews,
    dense,
    make_layout,
)
from phalanx.models.binned_rows import BinnedRows, RememberedRows, Trees
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
        self._remembered = RememberedRows()

    def initial_parameters(self, seed: int) -> Array:
        """Return trees without splits, all of whose values are 0."""
        parameters = np.zeros(self.layout.element_count, self._dtype)
        self._views(parameters)[FEATURE][...] = -1
        return parameters

    def gradient(self, parameters: Array, batch: Batch, out: Array) -> LeafSums:
        """Contribute what the stage of the cursor asks for. The loss is that of the trees of the
        rounds before, for all levels of a round; before the first there is none."""
        out[:] = 0
        tensors, sums = self._views(parameters), self._views(out)
        cursor, outputs = tensors[CURSOR], self._shape.outputs
        stage, tree = int(cursor[STAGE]), int(cursor[TREE])
        if stage == SKETCH:
            self._sketch(batch, sums)
            return LeafSums(batch.rows, 0.0)
        if stage == CENTER:
            sums[SUMS][0] = np.rint(np.ldexp(batch.targets, int(cursor[SHIFT]))).sum()
            return LeafSums(batch.rows, 0.0)
        trees = Trees(
            tensors[BASE], tensors[EDGES], [tensors[name] for name in (FEATURE, THRESHOLD, VALUE)]
        )
        before = tree - tree % outputs
        rows = self._remembered.scored(batch.shard, batch.features, trees, before)
        if tree < self._shape.trees:
            self._histogram(rows, batch.targets, tensors, sums[SUMS])
        return LeafSums(batch.rows, self._output.residual(np.array(rows.scores), batch.targets))

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

    def _histogram(
        self, rows: BinnedRows, targets: Array, tensors: dict[str, Array], out: Array
    ) -> None:
        """Write (measures, nodes of the level, features, bins) sums of the rows."""
        shape, shift = self._shape, int(tensors[CURSOR][SHIFT])
        tree, level = (int(tensors[CURSOR][each]) for each in (TREE, LEVEL))
        first, slope = self._derivatives(rows.scores, targets, tree % shape.outputs)
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
