"""Jobs whose versions no elementwise optimizer makes: the shipped ones of `phalanx.updates`.

What such a job keeps from step to step is in its vector: dual variables, a cursor, the scores of a
step's rows. A leaf here writes what the real one would, where the real one would, but of made-up
numbers: cheap, pure, depending on all that the vector holds, and of sizes that differ by shard, so
that the order in which they are added shows wherever it does in real ones.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from google.protobuf.json_format import ParseDict
from numpy.typing import NDArray

from phalanx.models import boosting
from phalanx.models.base import TensorViews, make_layout
from phalanx.models.dual_svm import DUALS, ROUNDS
from phalanx.models.k_means import CANDIDATES, CENTERS, SIZES, is_beginning
from phalanx.models.linear import BIAS, WEIGHTS
from phalanx.models.split_features import SCORED, SCORES, state_tensor
from phalanx.optimizers import build_optimizer
from phalanx.specs.parts import COLUMNS, update_kind, verifies
from phalanx.specs.workspaces import MEASURES
from phalanx.updates import Update, build_update
from phalanx.v1.job_spec_pb2 import JobSpec, Train
from phalanx.v1.training_pb2 import JobPlan, Layout
from tests.simulation.moments import BETWEEN_ROUNDS
from tests.simulation.parts import PARTS, UPDATING

Array = NDArray[Any]
Views = dict[str, Array]

SHARE = 0.12
"""Part of the swarm's runs whose jobs nothing else is asked of, in which they are such."""
VERIFIED_WORKERS = 3
STRUCK_SHARE = 0.5
"""Part of those whose steps have two rounds in which somebody is killed between these, again and
again."""
STRUCK = ("aggregator", "aggregator", "worker", "control")

VERIFIED = tuple(name for name, train in UPDATING.items() if "verification" in train)
"""Of these, those whose contributions are compared."""

_WEIGHTS = 24
_DUALS = 40
_FEATURES, _BINS, _DEPTH, _TREES, _CELLS = 2, 4, 2, 8, 8
_CLUSTERS, _DIMENSIONS, _CANDIDATES = 3, 4, 12
_SCORES = 16
_BOOSTING_STEPS = 1 + _TREES * _DEPTH
"""All trees are grown then."""


def kind_of(parts: str) -> str:
    """Which algorithm makes the versions of a job of these parts, see `update_kind`; empty where
    none of these does."""
    return parts.partition(",")[0].replace("-", "_") if parts in UPDATING else ""


def name_of(spec: JobSpec) -> str:
    """The parts of a job that a spec describes, where it is one of these."""
    asked = update_kind(spec), verifies(spec.train), spec.train.optimizer.HasField("clip_norm")
    for name, document in UPDATING.items():
        clipped = "clip_norm" in document.get("optimizer", {})
        if asked == (kind_of(name), name in VERIFIED, clipped):
            return name
    return ""


def composed(shape: Any, parts: str) -> Any:
    """The shape of a job of these parts: its vector has the length that they need."""
    kind = kind_of(parts)
    dtype = "float64" if kind == "boosting" else shape.dtype
    optimizer = shape.optimizer if kind == COLUMNS else ""
    made = replace(shape, parts=parts, dtype=dtype, optimizer=optimizer)
    if kind == "boosting":
        every = whole_rounds(parts, made.evaluate_every)
        made = replace(made, steps=min(made.steps, _BOOSTING_STEPS), evaluate_every=every)
    if kind == COLUMNS:
        made = replace(made, steps=made.steps // rounds_of(parts))  # so many rounds as others
    return replace(made, elements=layout_of(made).element_count)


def write(spec: JobSpec, parts: str) -> None:
    """Have a spec describe such a job: without what does not go with it."""
    train, kind = spec.train, kind_of(parts)
    if kind == COLUMNS:
        spec.data.columns.SetInParent()
        return
    train.ClearField("batch_size")
    if not train.optimizer.HasField("cocoa"):
        train.ClearField("optimizer")
        train.ClearField("l2")


def layout_of(shape: Any) -> Layout:
    """What a worker finds out by building the model; the workspace comes last."""
    return _KINDS[kind_of(shape.parts)].layout(shape)


def initial(shape: Any) -> Array:
    """Version 0: as a rule the workspace is empty, and so it is here."""
    layout = layout_of(shape)
    vector = np.zeros(layout.element_count, shape.dtype)
    views = TensorViews(layout)(vector)
    for number, tensor in enumerate(layout.tensors):
        if _KINDS[kind_of(shape.parts)].begins_somewhere and not tensor.workspace:
            views[tensor.name][...] = np.sin(np.arange(views[tensor.name].size) * 0.37 + number)
    if boosting.FEATURE in views:
        views[boosting.FEATURE][...] = -1
    return vector


def contribute(shape: Any, shard: int, version: int, parameters: Array, out: Array) -> float:
    """Write what a shard contributes to the version after this one; return the sum of its loss."""
    views = _views(shape.parts, shape.shards, shape.dtype, shape.optimizer)
    out[:] = 0
    kind = _KINDS[kind_of(shape.parts)]
    kind.leaf(views(parameters), views(out), shard, shape.shards, version)
    return loss(shape, shard, version)


def loss(shape: Any, shard: int, version: int) -> float:
    """The loss sum of one leaf."""
    if kind_of(shape.parts) != COLUMNS:
        return 0.1 * (shard + 1) / (version + 3)
    # The first shard tells it, and only once the scores are there.
    return 0.7 / (version + 3) if version % 2 and shard == 0 else 0.0


def rounds_of(parts: str) -> int:
    """Versions that a step of a job of these parts makes."""
    return 2 if kind_of(parts) == COLUMNS else 1


def steps_before_rounds(parts: str) -> int:
    """Steps after which a job begins to be evaluated every so often: boosting first finds out where
    values lie."""
    return 1 if kind_of(parts) == "boosting" else 0


def whole_rounds(parts: str, steps: int) -> int:
    """At least so many steps between evaluations: boosting is evaluated when a tree has grown."""
    return -(-steps // _DEPTH) * _DEPTH if kind_of(parts) == "boosting" else steps


def model_elements(shape: Any) -> int:
    """Elements of the vector that become the model."""
    if not kind_of(shape.parts):
        return int(shape.elements)
    tensors = layout_of(shape).tensors
    return sum(int(np.prod(each.shape)) for each in tensors if not each.workspace)


def update_of(shape: Any, spec: JobSpec) -> Update:
    """What makes one version of the other."""
    plan = JobPlan(
        spec=spec.SerializeToString(),
        layout=layout_of(shape),
        shards=shape.shards,
        total_steps=shape.steps,
        by_columns=kind_of(shape.parts) == COLUMNS,
    )
    update = build_update(plan)
    assert update is not None
    return update


def drawn(settings: Any, chance: random.Random, make: Callable[[Any, str], Any]) -> Any:
    """The settings of a run of the swarm, in some of which the jobs are such."""
    shapes = settings.shapes
    plain = not settings.parts and not settings.wishes and not any(each.bad for each in shapes)
    plain = plain and all(each.parts in PARTS and not each.tolerant for each in shapes)
    if not plain or chance.random() >= SHARE:
        return settings
    several = settings.workers >= VERIFIED_WORKERS and not settings.mixed
    possible = [name for name in UPDATING if several or name not in VERIFIED]
    names = [chance.choice(possible) for _ in shapes]
    if any(name in VERIFIED for name in names):
        settings = replace(settings, lasting=False, liars=chance.choice([0, 1]))
    made = tuple(make(shape, name) for shape, name in zip(shapes, names, strict=True))
    strike = f"{BETWEEN_ROUNDS} {chance.choice(STRUCK)} kill"
    by_columns = any(kind_of(name) == COLUMNS for name in names)
    struck = by_columns and not settings.strike and chance.random() < STRUCK_SHARE
    return replace(settings, shapes=made, strike=strike if struck else settings.strike)


# What the leaves of each kind do


@dataclass(frozen=True)
class _Kind:
    layout: Callable[[Any], Layout]
    leaf: Callable[[Views, Views, int, int, int], None]
    begins_somewhere: bool = False
    """Whether its model begins with numbers; else with zeros."""


@functools.lru_cache(maxsize=256)
def _wave(count: int, shard: int) -> NDArray[np.float64]:
    return np.cos(np.arange(count) * (0.11 + 0.07 * shard))


def _magnitude(shard: int, version: int) -> float:
    return (0.001, 1.0, 37.0)[(shard + version) % 3]


def _cocoa_layout(shape: Any) -> Layout:
    workspace = [(DUALS, (_DUALS,)), (ROUNDS, (1,))]
    return make_layout([(WEIGHTS, (_WEIGHTS,), True)], shape.dtype, workspace=workspace)


def _cocoa(now: Views, change: Views, shard: int, shards: int, version: int) -> None:
    """Its own dual variables within their bounds, and what they change in the weights."""
    own = slice(shard, None, shards)
    before = now[DUALS][own]
    moved = 0.2 * np.sin(_wave(len(before), shard) * 5 + now[WEIGHTS].sum() + now[ROUNDS][0])
    after = np.clip(before + moved, 0, 1).astype(before.dtype)
    change[DUALS][own] = after - before
    pull = _wave(_WEIGHTS, shard) * float((after - before).sum()) - 0.02 * now[WEIGHTS]
    change[WEIGHTS][...] = pull * (0.01 * _magnitude(shard, version))


def _k_means_layout(shape: Any) -> Layout:
    tensors = [(CENTERS, (_CLUSTERS, _DIMENSIONS), False), (SIZES, (_CLUSTERS,), False)]
    workspace = [(CANDIDATES, (_CANDIDATES, _DIMENSIONS))]
    return make_layout(tensors, shape.dtype, workspace=workspace)


def _k_means(now: Views, sums: Views, shard: int, shards: int, version: int) -> None:
    """Rows that centers are drawn of, and then which of them are near to each."""
    if is_beginning(now[SIZES]):
        places = np.arange(shard, _CANDIDATES, shards)
        sums[CANDIDATES][places] = np.sin(places[:, np.newaxis] * 1.7 + np.arange(_DIMENSIONS))
        return
    rows = 1 + (shard + np.arange(_CLUSTERS) + int(now[SIZES][0])) % 3
    sums[SIZES][...] = rows
    near = _wave(_CLUSTERS * _DIMENSIONS, shard) * _magnitude(shard, version)
    near = now[CENTERS] * 0.8 + near.reshape(now[CENTERS].shape)
    sums[CENTERS][...] = near * rows[:, np.newaxis]


def _boosting_layout(shape: Any) -> Layout:
    size = (_TREES, (2 << _DEPTH) - 1)
    names = (boosting.FEATURE, boosting.THRESHOLD, boosting.VALUE)
    tensors = [
        (boosting.BASE, (1,), False),
        (boosting.EDGES, (_FEATURES, _BINS - 1), False),
        *((name, size, False) for name in names),
    ]
    widest = MEASURES * (1 << _DEPTH) // 2 * _FEATURES * _BINS
    workspace = [
        (boosting.CURSOR, (4,)),
        (boosting.SUMS, (widest,)),
        (boosting.GRID, (_FEATURES, _CELLS)),
        (boosting.SPREAD, (2, _FEATURES)),
        (boosting.CLASS_ROWS, (2,)),
    ]
    return make_layout(tensors, shape.dtype, workspace=workspace)


def _boosting(now: Views, sums: Views, shard: int, shards: int, version: int) -> None:
    """Whole numbers, of the stage of the cursor: where values lie, or the histograms of a level."""
    cursor = now[boosting.CURSOR]
    if cursor[boosting.STAGE] == boosting.SKETCH:
        sums[boosting.GRID][...] = (np.arange(_FEATURES * _CELLS) * (shard + 3) % 7).reshape(
            _FEATURES, _CELLS
        )
        sums[boosting.CLASS_ROWS][...] = 5 + shard, 3
        if shard == 0:
            sums[boosting.SPREAD][...] = [[0.5] * _FEATURES, [2.0] * _FEATURES]
        return
    tree, level = int(cursor[boosting.TREE]), int(cursor[boosting.LEVEL])
    if tree >= _TREES:
        return
    nodes = 2**level
    place = np.arange(nodes * _BINS).reshape(nodes, 1, _BINS)
    # Of each feature the same rows, in other bins.
    place = np.concatenate([place, place[:, :, ::-1]], axis=1)
    measures = sums[boosting.SUMS][: MEASURES * place.size].reshape(MEASURES, *place.shape)
    first = np.sin(place * (0.3 + shard) + tree * 1.7 + float(now[boosting.VALUE].sum()) * 11)
    shift = int(cursor[boosting.SHIFT])
    measures[0] = np.rint(np.ldexp(first, shift - 10))
    measures[1] = np.rint(np.ldexp(0.5 + first * first, shift - 10))
    measures[2] = 20 + (place + shard + tree) % 5


def _columns_layout(shape: Any) -> Layout:
    train = Train()
    optimizers = {
        "adam": {"adam": {"learning_rate": 0.1, "beta1": 0.9, "beta2": 0.9, "epsilon": 1e-8}},
        "momentum": {"sgd": {"learning_rate": 0.1, "momentum": 0.9}},
    }
    document = optimizers.get(shape.optimizer, {"sgd": {"learning_rate": 0.1}})
    ParseDict({"optimizer": document}, train)
    names = build_optimizer(train, 1).state_names
    workspace = [
        (SCORES, (_SCORES,)),
        (SCORED, (1,)),
        *((state_tensor(name), (_WEIGHTS + 1,)) for name in names),
    ]
    tensors = [(WEIGHTS, (_WEIGHTS,), True), (BIAS, (1,), False)]
    return make_layout(tensors, shape.dtype, workspace=workspace)


def _columns(now: Views, sums: Views, shard: int, shards: int, version: int) -> None:
    """What its own weights give to the scores of all rows; then what those make of its weights."""
    own = slice(shard * _WEIGHTS // shards, (shard + 1) * _WEIGHTS // shards)
    weights = now[WEIGHTS][own]
    step = version // 2
    values = np.cos(
        np.arange(_SCORES)[:, np.newaxis] * 0.3 + np.arange(own.start, own.stop) + step * 0.1
    )
    if not now[SCORED][0]:
        scores = (values * weights).sum(axis=1) * _magnitude(shard, step)
        sums[SCORES][...] = scores + (now[BIAS][0] if shard == 0 else 0)
        return
    residual = np.tanh(now[SCORES]) - _wave(_SCORES, 1)
    sums[WEIGHTS][own] = (values * residual[:, np.newaxis]).sum(axis=0)
    if shard == 0:
        sums[BIAS][0] = residual.sum()


_KINDS = {
    "cocoa": _Kind(_cocoa_layout, _cocoa),
    "k_means": _Kind(_k_means_layout, _k_means),
    "boosting": _Kind(_boosting_layout, _boosting),
    COLUMNS: _Kind(_columns_layout, _columns, begins_somewhere=True),
}


@functools.lru_cache(maxsize=64)
def _views(parts: str, shards: int, dtype: str, optimizer: str) -> TensorViews:
    return TensorViews(layout_of(_Sizes(parts, shards, dtype, optimizer)))


@dataclass(frozen=True)
class _Sizes:
    """All that a layout depends on."""

    parts: str
    shards: int
    dtype: str
    optimizer: str
