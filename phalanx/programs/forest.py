"""Random forests: every tree is drawn its rows by a seed of its own, so trees are tasks.

The graph: groups of trees are grown, blocks of rows are scored by the trees that did not see them,
and one task puts the model together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from google.protobuf.struct_pb2 import Value

from phalanx.errors import Violation
from phalanx.programs.base import Graph, Program, stored_bytes
from phalanx.texts import number_of
from phalanx.v1.dataset_service_pb2 import Dataset
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import JobPlan

TREES_MAX = 10_000
ROWS_OF_A_TASK = 20_000
"""Trees on fewer rows are grown by several to a task: one takes a fraction of a second."""

BLOCKS_MAX = 16
"""Each block of rows is scored with all trees."""

GROWN_DENSE_BYTES = 2**30
"""Sparse rows are made dense to grow trees on where they take no more than this: it is many times
as fast, and the trees are the same but for splits that are equally good."""

TASKS_WANTED, TASKS_MAX = 32, 1000
"""Not so many trees to a task that workers go without one; not more tasks than a model's pieces."""

FEATURES_MAX = 2**26
"""Their importances are 512 MiB, about half of what the result of a task may have."""

CRITERIA = {
    "classification": ("gini", "entropy", "log_loss"),
    "regression": ("squared_error", "absolute_error", "poisson"),
}


@dataclass(frozen=True)
class Layers:
    """Which tasks do what: the first `groups` grow trees, `blocks` more score rows, one ends."""

    trees: int
    groups: int
    blocks: int

    @staticmethod
    def of(plan: JobPlan) -> Layers:
        """Return those of a job."""
        spec = JobSpec.FromString(plan.spec)
        rows = plan.train_rows // max(1, plan.shards) if spec.forest.per_shard else plan.train_rows
        trees = spec.forest.trees
        group = min(ROWS_OF_A_TASK // max(1, rows), trees // TASKS_WANTED)
        group = max(1, group, math.ceil(trees / TASKS_MAX))
        blocks = plan.shards if spec.forest.per_shard else min(plan.shards, BLOCKS_MAX)
        return Layers(trees, math.ceil(trees / group), max(1, blocks))

    def trees_of(self, group: int) -> range:
        """Return the trees that a task grows."""
        return range(group * self.trees // self.groups, (group + 1) * self.trees // self.groups)


class Forest(Program):
    """Trees as scikit-learn's forests grow them, one by one."""

    name: ClassVar[str] = "forest"
    leaves_model: ClassVar[bool] = True

    def violations(self, spec: JobSpec) -> Iterator[Violation]:
        """See `Program`."""
        forest = spec.forest
        if not 1 <= forest.trees <= TREES_MAX:
            message = f"must be at least 1 and at most {TREES_MAX}, not {forest.trees}"
            yield Violation("forest.trees", message)
        if spec.data.rows.stratified and not forest.per_shard:
            message = "changes nothing where each tree sees all rows; set forest.per_shard as well"
            yield Violation("data.rows.stratified", message)
        for name in sorted(forest.tree.fields):
            complaint = _complaint(name, forest.tree.fields[name])
            if complaint:
                yield Violation(f"forest.tree.{name}", complaint)

    def violations_against(self, spec: JobSpec, dataset: Dataset) -> Iterator[Violation]:
        """See `Program`."""
        known = CRITERIA[dataset.task]
        if "criterion" in spec.forest.tree.fields:
            asked = spec.forest.tree.fields["criterion"].string_value
            if asked not in known:
                message = f"{asked[:40]!r} does not fit a {dataset.task}; use {', '.join(known)}"
                yield Violation("forest.tree.criterion", message)
        if dataset.features > FEATURES_MAX:
            message = (
                f"{number_of(dataset.features, 'feature')} are more than the {FEATURES_MAX:,} that "
                "a forest takes: choose fewer"
            )
            yield Violation("data.features", message)

    def resolve(self, spec: JobSpec, dataset: Dataset) -> None:
        """See `Program`: the defaults of scikit-learn's forests that its trees do not have."""
        if "max_features" not in spec.forest.tree.fields:
            everything = Value(string_value="all")
            value = Value(string_value="sqrt") if dataset.classes else everything
            spec.forest.tree.fields["max_features"].CopyFrom(value)

    def graph(self, plan: JobPlan) -> Graph:
        """See `Program`."""
        layers = Layers.of(plan)
        grown = tuple(range(layers.groups))
        scored = tuple(range(layers.groups, layers.groups + layers.blocks))
        return Graph(((),) * layers.groups + (grown,) * layers.blocks + (grown + scored,))

    def worker_bytes(self, spec: JobSpec, dataset: Dataset) -> int:
        """See `Program`: rows as they are read, as trees compare them, and as a tree sorts them."""
        rows = dataset.rows.get(spec.data.split, 0)
        if spec.forest.per_shard:
            rows = -(-rows // max(1, spec.data.shards))
        dense = 4 * rows * dataset.features
        if dataset.format == "csr" and dense > GROWN_DENSE_BYTES:
            return 3 * stored_bytes(dataset, rows)
        return 3 * dense

    def warnings(self, spec: JobSpec, dataset: Dataset) -> list[str]:
        """See `Program`."""
        shards, found = spec.data.shards, []
        chosen = spec.forest.tree.fields.get("max_features")
        if chosen is not None and chosen.number_value == 1 and dataset.features > 1:
            found.append(
                "forest.tree.max_features is 1, so each split looks at one feature; scikit-learn's "
                "1.0 is all here"
            )
        if spec.forest.per_shard and spec.forest.trees < shards:
            found.append(
                f"{number_of(spec.forest.trees, 'tree')} on {number_of(shards, 'shard')}: the rows "
                f"of {number_of(shards - spec.forest.trees, 'shard')} are never used"
            )
        return found


def tree_arguments(tree: Mapping[str, Value]) -> dict[str, Any]:
    """Return the keyword arguments of scikit-learn's trees that a job names."""
    return {name: _plain(name, value) for name, value in tree.items()}


def _plain(name: str, value: Value) -> Any:
    kind = value.WhichOneof("kind")
    if kind == "null_value" or (name == "max_features" and value.string_value == "all"):
        return None
    if kind == "string_value":
        return value.string_value
    number = value.number_value
    return int(number) if number.is_integer() and name not in _FRACTIONS else number


@dataclass(frozen=True)
class _Rule:
    """What a parameter may be: a whole number from `least` on, a part between 0 and `below`, one of
    `words`, or nothing."""

    least: int | None = None
    part: float | None = None
    words: tuple[str, ...] = ()
    none: bool = False

    def allows(self, value: Value) -> bool:
        """Whether a value is one of these."""
        kind = value.WhichOneof("kind")
        if kind == "null_value":
            return self.none
        if kind == "string_value":
            return value.string_value in self.words
        if kind != "number_value":
            return False
        number = value.number_value
        whole = number.is_integer() and self.least is not None and self.least <= number < 2**31
        return whole or (self.part is not None and 0 <= number <= self.part)

    def __str__(self) -> str:
        choices = [] if self.least is None else [f"a whole number from {self.least} on"]
        if self.part is not None:
            largest = "on" if math.isinf(self.part) else f"to {self.part:g}"
            choices.append(f"a number from 0 {largest}")
        choices += self.words
        if self.none:
            choices.append("null")
        return " or ".join(choices)


_FRACTIONS = ("min_weight_fraction_leaf", "min_impurity_decrease", "ccp_alpha")
_RULES = {
    "criterion": _Rule(words=(*CRITERIA["classification"], *CRITERIA["regression"])),
    "splitter": _Rule(words=("best", "random")),
    "max_depth": _Rule(least=1, none=True),
    "min_samples_split": _Rule(least=2, part=1.0),
    "min_samples_leaf": _Rule(least=1, part=1.0),
    "min_weight_fraction_leaf": _Rule(part=0.5),
    "max_features": _Rule(least=1, part=1.0, words=("sqrt", "log2", "all"), none=True),
    "max_leaf_nodes": _Rule(least=2, none=True),
    "min_impurity_decrease": _Rule(part=math.inf),
    "ccp_alpha": _Rule(part=math.inf),
}


def _complaint(name: str, value: Value) -> str:
    rule = _RULES.get(name)
    if rule is None:
        return f"is no parameter of a tree; use one of {', '.join(_RULES)}"
    if not rule.allows(value):
        return f"must be {rule}"
    # Zero of a part means nothing: scikit-learn would refuse it in every task.
    if name in ("min_samples_split", "min_samples_leaf", "max_features") and (
        value.WhichOneof("kind") == "number_value" and value.number_value == 0
    ):
        return f"must be {rule}, and not 0"
    if name == "min_samples_split" and value.number_value == 1:
        return "must be 2 or more, or a part below 1"
    return ""
