"""Every version of a simulated job by a plain loop.

None of the cluster's code is in it but the tree, the noise, and the optimizer or the update.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.compressors import Key, decoded, encoded
from phalanx.models.base import decay_mask
from phalanx.optimizers import build_optimizer, gradient_limit
from phalanx.privacy.noise import build_noise
from phalanx.reducers import Contribution, build_reducer
from phalanx.reduction import reduce_leaves
from phalanx.specs.parts import state_every, unit_span
from phalanx.v1 import training_pb2
from tests.simulation import jobs, updating

Array = NDArray[Any]


def reference(shape: jobs.Shape) -> list[Array]:
    """All versions, from 0 to the last."""
    # Where checkpoints lie does not change what is computed, nor does when it ends.
    found = _reference(_plain(shape))
    return [found[version] for version in range(shape.ends_at * shape.rounds + 1)]


def versions(shape: jobs.Shape) -> Reference:
    """The versions of a job of this shape, however many steps it has."""
    return _reference(_plain(shape))


def after(shape: jobs.Shape, step: int) -> Array:
    """The version that is there once so many steps are done."""
    return versions(shape)[step * shape.rounds]


def state_of(shape: jobs.Shape, version: int) -> dict[str, Array]:
    """The optimizer's state with which the step after a version begins."""
    return _reference(_plain(shape)).state(version)


def kept_of(shape: jobs.Shape, version: int) -> dict[str, Array]:
    """What a checkpoint keeps of the states of nodes, by name."""
    every = state_every(jobs.job_spec(shape, f"job-{shape.elements}"))
    if not every:
        return {}
    base = version - version % every
    made = _reference(_plain(shape))
    kept = {f"version/{number}": made[number] for number in range(base, version)}
    state = made.state(base) if base else {}
    for first in range(0, shape.shards, made.unit) if base else ():
        own = [f"{_LEFT_OUT}{first}", *_inner_names(shape, first, made.unit)]
        vectors = [state[name] for name in own if name in state]
        kept |= {f"state/{base}/{first}/{i}": vector for i, vector in enumerate(vectors)}
    return kept


def _inner_names(shape: jobs.Shape, first: int, span: int = 1) -> list[str]:
    """Names in a `Reference`'s state of what the optimizers of some shards remember."""
    names = jobs.local_optimizer(shape).state_names if shape.local_steps else ()
    shards = range(first, min(first + span, shape.shards))
    return [f"{_INNER}{shard}/{name}" for shard in shards for name in names]


@functools.lru_cache(maxsize=1024)
def _plain(shape: jobs.Shape) -> jobs.Shape:
    plain = replace(shape, steps=jobs.STEPS_MAX, checkpoint_every=0, evaluate_every=0, plateau=0)
    return replace(plain, best=False)


@functools.lru_cache(maxsize=512)
def _reference(shape: jobs.Shape) -> Reference:
    return Reference(shape)


class Reference:
    """The versions of a job by a plain loop, each computed once somebody asks for it."""

    def __init__(self, shape: jobs.Shape) -> None:
        self._steps = UpdatedSteps(shape) if shape.updating else Steps(shape)
        self._versions = [jobs.initial(shape).copy()]
        self._states = [self._steps.first_state() | self._steps.first_inner()]
        self.unit = self._steps.unit

    def __getitem__(self, version: int) -> Array:
        self._reach(version)
        return self._versions[version]

    def state(self, version: int) -> dict[str, Array]:
        """The optimizer's state after a version."""
        self._reach(version)
        return self._states[version]

    def _reach(self, version: int) -> None:
        for number in range(len(self._versions) - 1, version):
            state = {name: array.copy() for name, array in self._states[-1].items()}
            self._versions.append(self._steps.apply(number, self._versions[-1], state))
            self._states.append(state)


_LEFT_OUT = "left out/"
"""With the first shard of a node: what its contributions have left out so far."""


_INNER = "inner/"
"""With a shard and the name of a vector: what the shard's own optimizer remembers."""


class Steps:
    """The steps of a job by a plain loop."""

    def __init__(self, shape: jobs.Shape) -> None:
        spec = jobs.job_spec(shape, f"job-{shape.elements}")
        self._shape = shape
        self._optimizer = build_optimizer(spec.train, shape.steps)
        self._reducer = build_reducer(spec.train, shape.shards)
        self.unit, self._limit = unit_span(spec) or 1, gradient_limit(spec.train)
        self._mask = decay_mask(jobs.layout_of(shape))
        plan = training_pb2.JobPlan(spec=spec.SerializeToString(), train_rows=jobs.TRAIN_ROWS)
        self._noise = build_noise(plan, jobs.SECRET)

    def first_state(self) -> dict[str, Array]:
        """The optimizer's state before the first step."""
        names = self._optimizer.state_names
        return {name: np.zeros(self._shape.elements, self._shape.dtype) for name in names}

    def first_inner(self) -> dict[str, Array]:
        """What the optimizers of all shards remember before the first step."""
        names = _inner_names(self._shape, 0, self._shape.shards)
        return {name: np.zeros(self._shape.elements, self._shape.dtype) for name in names}

    def received(
        self, version: int, parameters: Array, state: dict[str, Array] | None = None
    ) -> dict[int, tuple[Array | None, int]]:
        """What the nodes that travel bring to the root at a version, with their examples."""
        shape, unit = self._shape, self.unit
        seen = jobs.as_seen(shape, parameters)
        leaves = []
        for shard in range(shape.shards):
            own = {name.rpartition("/")[2]: state[name] for name in _inner_names(shape, shard)}
            leaves.append(jobs.contribution(shape, shard, version, seen, own))
        nodes: dict[int, tuple[Array | None, int]] = {}
        for first in range(0, shape.shards, unit):
            below = leaves[first : first + unit]
            total = reduce_leaves({i: each[0] for i, each in enumerate(below)}, len(below))
            codec = jobs.up_codec(shape.parts, shape.dtype)
            if total is not None and codec is not None:
                name = f"{_LEFT_OUT}{first}"
                if state is not None and name in state:
                    total = total + state[name]
                data = encoded(codec, total, Key(first, version))
                back = decoded(codec, data, len(total))
                if state is not None and codec.feedback:
                    state[name] = total - back
                total = back
            nodes[first] = total, sum(each[1] for each in below)
        return nodes

    def apply(self, version: int, parameters: Array, state: dict[str, Array]) -> Array:
        """The next version; the state becomes that after it."""
        nodes = self.received(version, parameters, state)
        return self.applied(version, parameters, state, nodes)

    def applied(
        self,
        version: int,
        parameters: Array,
        state: dict[str, Array],
        nodes: dict[int, tuple[Array | None, int]],
    ) -> Array:
        """The next version, made of these nodes only."""
        total = reduce_leaves({first: each[0] for first, each in nodes.items()}, self._shape.shards)
        divisor = sum(count for _, count in nodes.values())
        if self._reducer is not None:
            reduced = self._reducer.reduce(
                {
                    first: Contribution([values], count)
                    for first, (values, count) in nodes.items()
                    if values is not None
                }
            )
            total, divisor = (None, 0) if reduced is None else (reduced.pieces[0], reduced.divisor)
        if self._noise is not None:
            total = self._noise.added(total, 0, len(parameters), version, parameters.dtype)
            divisor = self._noise.divisor
        out = parameters.copy()
        if total is not None:
            factor = Contribution([total], divisor).factor(self._limit)
            if factor != 1.0:
                total = total * total.dtype.type(factor)
            self._optimizer.apply(parameters, total, divisor, self._mask, state, version, out)
        return out


class UpdatedSteps(Steps):
    """The same of a job whose versions no elementwise optimizer makes."""

    def __init__(self, shape: jobs.Shape) -> None:
        spec = jobs.job_spec(shape, f"job-{shape.elements}")
        self._shape = shape
        self._update = updating.update_of(shape, spec)
        self.unit = 1

    def first_state(self) -> dict[str, Array]:
        """Nothing: all of it is in the vector."""
        return {}

    def apply(self, version: int, parameters: Array, state: dict[str, Array]) -> Array:
        """The next version: of one round where a step has several."""
        nodes = self.received(version, parameters, state)
        total = reduce_leaves({first: each[0] for first, each in nodes.items()}, self._shape.shards)
        assert total is not None
        count = sum(each[1] for each in nodes.values())
        return self._update.apply(parameters, total.copy(), count, version)


def reference_sha256(shape: jobs.Shape, step: int) -> str:
    """What the parameters of a model of this step must hash to: without a workspace."""
    own = after(shape, step)[: updating.model_elements(shape)]
    return hashlib.sha256(own.tobytes()).hexdigest()
