"""Optimizers as root functions: elementwise, and bit-equal however the vector is cut."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.errors import InvalidArgument
from phalanx.optimizers.rules import AdagradRule, AdamRule, MomentumRule, Rule, SgdRule
from phalanx.optimizers.schedules import learning_rate
from phalanx.specs.parts import by_columns
from phalanx.v1 import job_spec_pb2

Array = NDArray[Any]

#: Elements per piece. Small enough that the pieces of all vectors involved stay in cache between
#: the passes over them, large enough that the calls cost nothing; measured for SGD and Adam.
PIECE_ELEMENTS = 65_536


class Optimizer:
    """Turns a gradient sum into new parameters; for one thread at a time.

    Attributes:
        state_names: names of the state vectors; each has the length and dtype of the parameters
            and starts at zero.
    """

    def __init__(
        self, rule: Rule, message: job_spec_pb2.Optimizer, l2: float, total_steps: int
    ) -> None:
        self._rule = rule
        self._message = message
        self._l2 = l2
        self._total_steps = total_steps
        self._scratch: Array = np.empty((2, 0))
        self._rate = (-1, 0.0)
        self.state_names = rule.state_names

    def apply(
        self,
        parameters: Array,
        gradient_sum: Array,
        count: int,
        decay: Array | None,
        state: dict[str, Array],
        step: int,
        out: Array,
        *,
        update: int | None = None,
        rate_scale: float = 1.0,
        buffers: Array | None = None,
    ) -> None:
        """Write the parameters of version ``step + 1`` to ``out``; update ``state`` in place.

        Args:
            parameters: (n,) version ``step``; never written.
            gradient_sum: (n,) sum over ``count`` examples; never written.
            count: number of examples, 1 or more; the division happens here and only here.
            decay: (n,) bool, where L2 λ/2‖w‖² and weight decay act; None: nowhere.
            state: name → (n,) vector.
            step: version at which the gradient was taken, from 0.
            out: (n,), may not overlap the inputs.
            update: updates before this one, where a step is several of them; None: ``step``.
            rate_scale: factor of the learning rate.
            buffers: (n,) bool, where ``gradient_sum`` is no gradient but what the elements become,
                times the examples: they become its mean; None: nowhere.
        """
        if count < 1:
            raise InvalidArgument(f"a step needs at least 1 example, not {count}")
        update = step if update is None else update
        rate = self._rate_at(step, update) * rate_scale
        gradient, scratch = self._buffers(min(PIECE_ELEMENTS, len(parameters)), parameters.dtype)
        with np.errstate(all="ignore"):  # the caller looks whether the result is finite
            for first in range(0, len(parameters), PIECE_ELEMENTS):
                piece = slice(first, first + PIECE_ELEMENTS)
                w = parameters[piece]
                g, s = gradient[: len(w)], scratch[: len(w)]
                np.divide(gradient_sum[piece], w.dtype.type(count), out=g)
                where = None if decay is None else _where(decay[piece])
                if self._l2 and where is not None:
                    np.multiply(w, w.dtype.type(self._l2), out=s)
                    np.add(g, s, out=g, where=where)
                which = None if buffers is None else _where(buffers[piece])
                if which is not None:
                    np.copyto(g, 0, where=which)  # nothing gets into the optimizer's state
                pieces = {name: vector[piece] for name, vector in state.items()}
                self._rule.update(w, g, pieces, rate, update, out[piece], s)
                if self._rule.decoupled_decay and where is not None:
                    np.multiply(w, w.dtype.type(rate * self._rule.decoupled_decay), out=s)
                    np.subtract(out[piece], s, out=out[piece], where=where)
                if which is not None:
                    n = w.dtype.type(count)
                    np.divide(gradient_sum[piece], n, out=out[piece], where=which)

    def _rate_at(self, step: int, update: int) -> float:
        """The learning rate, which is the same for all pieces and frames of a step."""
        if self._message.HasField("pegasos"):
            return 1.0 / (self._l2 * (update + 1))  # by updates: each is one of its iterations
        if self._rate[0] != step:
            self._rate = (step, learning_rate(self._message, step, self._total_steps))
        return self._rate[1]

    def _buffers(self, size: int, dtype: np.dtype[Any]) -> Array:
        """Two vectors of scratch memory, kept from call to call."""
        if self._scratch.shape[1] < size or self._scratch.dtype != dtype:
            self._scratch = np.empty((2, size), dtype)
        return self._scratch


def _where(mask: Array) -> Array | bool | None:
    """The mask of one piece: None where nothing is marked, True where all is (faster)."""
    if mask.all():
        return True
    return mask if mask.any() else None


def build_optimizer(train: job_spec_pb2.Train, total_steps: int) -> Optimizer:
    """Return what makes the next version; ``total_steps`` is 0 where the job has no length.

    With local steps it is the outer optimizer, which takes the shards' differences for gradients.
    Raises InvalidArgument where no optimizer is named.
    """
    if train.HasField("local"):
        return _build(train.local.outer, 0.0, total_steps)
    return _build(train.optimizer, train.l2, total_steps)


def gradient_limit(train: job_spec_pb2.Train) -> float | None:
    """Return the longest norm of the mean gradient that the root applies; None: no limit."""
    message = train.local.outer if train.HasField("local") else train.optimizer
    return message.clip_norm if message.HasField("clip_norm") else None


def round_limit(spec: job_spec_pb2.JobSpec) -> float | None:
    """Return the longest norm of what the contributions to a round add up to, by their examples.

    None where nothing limits it, and where it holds scores beside a gradient: then whoever takes
    the gradient out of it looks at that.
    """
    return None if by_columns(spec.data) else gradient_limit(spec.train)


def build_local_optimizer(train: job_spec_pb2.Train, total_steps: int) -> Optimizer:
    """Return what a shard takes its local steps with; ``total_steps`` counts those of a shard."""
    return _build(train.optimizer, train.l2, total_steps)


def _build(message: job_spec_pb2.Optimizer, l2: float, total_steps: int) -> Optimizer:
    rule: Rule
    match message.WhichOneof("kind"):
        case "sgd":
            rule = MomentumRule(message.sgd) if message.sgd.momentum else SgdRule()
        case "pegasos":
            rule = SgdRule()
        case "adagrad":
            rule = AdagradRule(message.adagrad)
        case "adam":
            rule = AdamRule(message.adam)
        case "adamw":
            rule = AdamRule(message.adamw)
        case other:
            raise InvalidArgument(f"{other!r} is not an optimizer")
    return Optimizer(rule, message, l2, total_steps)
