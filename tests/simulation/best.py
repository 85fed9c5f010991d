"""Jobs of the simulator that keep their best evaluation: which one that is, and where it must be.

Their loss goes up and down from evaluation to evaluation, twice to the same least one, so that the
best is mostly neither the last one nor the only one that looks like it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from numpy.typing import NDArray

from phalanx.training.best import BEST_VECTOR
from phalanx.v1 import storage_service_pb2 as pb
from tests.simulation import updating
from tests.simulation.jobs import Shape, evaluations, quality

Array = NDArray[Any]

SHARE = 0.12
"""Part of the swarm's runs in which the jobs are such."""
EVALUATE_EVERY = 5
"""Steps between evaluations of a job that had none."""


def drawn(settings: Any, chance: random.Random) -> Any:
    """The settings of a run of the swarm, in some of which jobs keep their best evaluation."""
    if chance.random() >= SHARE or any(shape.plateau for shape in settings.shapes):
        return settings
    return replace(settings, shapes=tuple(keeping(shape) for shape in settings.shapes))


def keeping(shape: Shape) -> Shape:
    """The same job, which keeps its best evaluation."""
    every = updating.whole_rounds(shape.parts, shape.evaluate_every or EVALUATE_EVERY)
    return replace(shape, best=True, evaluate_every=every)


def best_step(shape: Shape, step: int) -> int | None:
    """The first of the best evaluations up to a step, its own included; None: there is none."""
    if not shape.best:
        return None
    return min(
        evaluations(shape, step), key=lambda each: (quality(shape, each), each), default=None
    )


def model_step(shape: Shape, step: int) -> int:
    """The step whose parameters the model has of a job that ends at a step."""
    best = best_step(shape, step)
    return step if best is None else best


def wrong_with(shape: Shape, step: int, vectors: Mapping[str, Array], expected: Array) -> str:
    """What is wrong with the best version in a checkpoint of a step, where it is as expected."""
    kept, best = vectors.get(BEST_VECTOR), model_step(shape, step)
    if best == step:
        return "" if kept is None else "holds a best version beside its own"
    if kept is None:
        return f"lacks the best version, that of step {best}"
    same = kept.tobytes() == expected.tobytes()
    return "" if same else f"holds another version as the best than that of step {best}"


def wrong_with_manifest(shape: Shape, manifest: pb.CheckpointManifest) -> str:
    """What is wrong with what a checkpoint's root, and its entry, say of the best version."""
    best = best_step(shape, manifest.step)
    told = json.loads(manifest.root_state).get("best")
    if (None if told is None else told["step"]) != best:
        return f"says that {told} is the best, and it is that of step {best}"
    beside = model_step(shape, manifest.step) != manifest.step
    if any(bool(part.best_offset) != beside for part in manifest.parts):
        return f"says at {[part.best_offset for part in manifest.parts]} that it holds step {best}"
    return ""
