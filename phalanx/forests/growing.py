"""The tasks of a forest: growing trees, scoring rows that they did not see, putting all together.

Seeds, rows and parameters are those of scikit-learn's forests of the same seed, so that each tree
is the same as theirs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.forests.model import float32_blocks
from phalanx.forests.tables import (
    IMPORTANCES,
    VALUES,
    Table,
    Tree,
    mean_importances,
    table_of,
    tensor_name,
)
from phalanx.learn import need_scikit_learn
from phalanx.programs import arrays
from phalanx.programs.base import ModelParts, Outcome, Piece
from phalanx.programs.data import JobData, Result
from phalanx.programs.forest import GROWN_DENSE_BYTES, Layers, tree_arguments
from phalanx.training.leaf import training_rows
from phalanx.training.sampler import rows_in_order
from phalanx.v1.training_pb2 import Layout, TensorSpec

_SEED_MAX = int(np.iinfo(np.int32).max)


@dataclass(frozen=True)
class Rows:
    """What a tree is grown on: float32 features, and classes or float64 numbers."""

    features: Any
    targets: NDArray[Any]

    @property
    def count(self) -> int:
        """Number of rows."""
        return len(self.targets)


def seeds_of(seed: int, trees: int) -> NDArray[np.int64]:
    """Return the seed of each tree, as scikit-learn draws them from that of the forest."""
    draw = np.random.RandomState(seed % 2**32)
    return np.array([draw.randint(_SEED_MAX) for _ in range(trees)], np.int64)


def times_drawn(seed: int, rows: int) -> NDArray[np.int64]:
    """Return how often each row is drawn for a tree: as many in all as there are rows."""
    drawn = np.random.RandomState(seed).randint(0, rows, rows)
    return np.bincount(drawn.astype(np.int32), minlength=rows)


class ForestTasks:
    """Runs the tasks of one job. Raises FailedPrecondition without scikit-learn."""

    def __init__(self, job: JobData) -> None:
        need_scikit_learn("growing trees")
        self._job = job
        self._forest = job.spec.forest
        self._layers = Layers.of(job.plan)
        self._split = job.spec.data.split
        self._seeds = seeds_of(job.spec.seed, self._forest.trees)
        self._shards: dict[int, Rows] = {}

    def run(self, task: int, inputs: Sequence[Result]) -> bytes:
        """Run one task of the graph."""
        layers = self._layers
        if task < layers.groups:
            return self._grow(layers.trees_of(task))
        if task < layers.groups + layers.blocks:
            return self._score(task - layers.groups, inputs)
        return self._put_together(inputs[: layers.groups], inputs[layers.groups :])

    def _grow(self, trees: range) -> bytes:
        return arrays.pack({tensor_name(tree): self._tree(tree) for tree in trees})

    def _tree(self, number: int) -> Table:
        from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

        rows, seed = self._rows_of(number), int(self._seeds[number])
        kind = DecisionTreeClassifier if self._job.classes else DecisionTreeRegressor
        tree = kind(random_state=seed, **tree_arguments(self._forest.tree.fields))
        tree.fit(rows.features, rows.targets, sample_weight=times_drawn(seed, rows.count))
        present = tree.classes_ if self._job.classes else np.zeros(0, np.int64)
        return table_of(tree, self._job.classes, present)

    # Rows that trees have not seen

    def _score(self, block: int, inputs: Sequence[Result]) -> bytes:
        """Have the rows of a block predicted by the trees for which they were not drawn.

        Of classes it says how many rows were right, of a regression what was predicted of each. A
        row that every tree was grown on counts as all zeros, as with scikit-learn. The first block
        adds the importances, which are of all trees: the model takes them from its result.
        """
        first, rows = self._block(block)
        total = np.zeros((rows.count, max(1, self._job.classes)))
        votes = np.zeros(rows.count, np.int64)
        tables = _tables(inputs)
        trees = {
            number: Tree.of(table)
            for number, table in enumerate(tables)
            if not self._forest.per_shard or number % self._layers.blocks == block
        }
        start = 0
        for features in float32_blocks(rows.features):
            stop = start + len(features)
            for number, tree in trees.items():
                drawn = times_drawn(int(self._seeds[number]), self._rows_drawn_from(rows))
                unseen = np.flatnonzero(drawn[first + start : first + stop] == 0)
                total[start + unseen] += tree.predict(features[unseen])
                votes[start + unseen] += 1
            start = stop
        total /= np.maximum(votes, 1)[:, None]
        found = {"unscored": np.array([np.count_nonzero(votes == 0)])}
        if self._job.classes:
            right = total.argmax(axis=1) == rows.targets
            found |= {"right": np.array([np.count_nonzero(right)])}
        else:
            found |= {"predicted": total[:, 0], "targets": rows.targets}
        if block == 0:
            found |= {IMPORTANCES: mean_importances(tables, self._job.manifest.features)}
        return arrays.pack(found)

    def _rows_drawn_from(self, block: Rows) -> int:
        return block.count if self._forest.per_shard else self._job.plan.train_rows

    def _block(self, block: int) -> tuple[int, Rows]:
        """Return the rows of a block, and where they begin among those that trees draw from."""
        if self._forest.per_shard:
            return 0, self._shard(block)
        first = block * self._job.plan.train_rows // self._layers.blocks
        return first, self._as_rows(self._job.block(*self._at(block), self._dtype))

    def _at(self, block: int) -> tuple[str, int, int]:
        return self._split, block, self._layers.blocks

    # The end

    def _put_together(self, grown: Sequence[Result], scored: Sequence[Result]) -> bytes:
        tensors: list[TensorSpec] = []
        pieces: list[Piece] = []
        nodes = 0
        for result in grown:
            places = arrays.places(result.read())
            nodes += sum(each.shape[0] for each in places.values())
            tensors += [TensorSpec(name=name, shape=each.shape) for name, each in places.items()]
            # The trees of a task lie one after another: storage takes so many pieces and no more.
            first = min(each.offset for each in places.values())
            pieces.append(Piece(result.digest, first, sum(each.length for each in places.values())))
        metrics = {
            "forest/trees": float(len(tensors)),
            "forest/nodes": float(nodes),
            **self._out_of_bag([arrays.unpack(result.read()) for result in scored]),
        }
        place = arrays.places(scored[0].read())[IMPORTANCES]
        tensors.append(TensorSpec(name=IMPORTANCES, shape=place.shape))
        pieces.append(Piece(scored[0].digest, place.offset, place.length))
        elements = nodes * (VALUES + max(1, self._job.classes)) + place.shape[0]
        layout = Layout(tensors=tensors, dtype="float64", element_count=elements)
        return Outcome(metrics, ModelParts(layout, tuple(pieces))).to_json()

    def _out_of_bag(self, blocks: list[dict[str, NDArray[Any]]]) -> dict[str, float]:
        rows = self._job.plan.train_rows
        unscored = float(sum(_number(block, "unscored") for block in blocks))
        if self._job.classes:
            right = sum(_number(block, "right") for block in blocks)
            return {"oob/accuracy": right / rows, "oob/unscored_rows": unscored}
        predicted = np.concatenate([block["predicted"] for block in blocks])
        targets = np.concatenate([block["targets"] for block in blocks])
        with np.errstate(over="ignore", invalid="ignore"):
            left = float(((targets - predicted) ** 2).sum())
            whole = float(((targets - targets.mean()) ** 2).sum())
        found = {"oob/rmse": math.sqrt(left / rows), "oob/unscored_rows": unscored}
        # A target that never changes has no R²; its mean may differ from it by rounding.
        found |= {"oob/r2": 1.0 - left / whole} if whole > 0 and np.ptp(targets) > 0 else {}
        # The squares of large numbers are none, and an outcome has no word for that.
        return {name: value for name, value in found.items() if math.isfinite(value)}

    # Rows

    @cached_property
    def _dtype(self) -> str:
        """Numbers to be predicted are read as they are stored; features become float32 after."""
        return "float32" if self._job.classes else "float64"

    @cached_property
    def _all(self) -> Rows:
        return self._as_rows(self._job.block(self._split, 0, 1, self._dtype))

    def _rows_of(self, tree: int) -> Rows:
        return self._shard(tree % self._layers.blocks) if self._forest.per_shard else self._all

    def _shard(self, number: int) -> Rows:
        if number not in self._shards:
            reader = self._job.reader(self._split, self._dtype)
            selections: list[Any] = rows_in_order(training_rows(self._job.plan, reader, number))
            self._shards[number] = self._as_rows(reader.rows(selections))
        return self._shards[number]

    def _as_rows(self, batch: Any) -> Rows:
        features = batch.features
        if isinstance(features, np.ndarray):
            return Rows(np.asarray(features, np.float32), batch.targets)
        if 4 * features.shape[0] * features.shape[1] <= GROWN_DENSE_BYTES:
            return Rows(features.astype(np.float32).toarray(), batch.targets)
        return Rows(features.astype(np.float32), batch.targets)


def _tables(inputs: Sequence[Result]) -> list[Table]:
    """Return the tables of all trees, in order."""
    return [table for result in inputs for table in arrays.unpack(result.read()).values()]


def _number(block: dict[str, NDArray[Any]], name: str) -> int:
    return int(block[name][0])
