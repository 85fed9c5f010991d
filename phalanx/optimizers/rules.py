"""Update rules on one cache-sized piece of the parameter vector.

Every rule is elementwise, so the bits do not depend on how the vector is cut into ranges, frames
or pieces. Scalars are converted to the dtype of the vector first: a Python float would do, but a
NumPy float64 scalar would silently widen the arithmetic.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from phalanx.v1.job_spec_pb2 import Adagrad, Adam, AdamW, Sgd

Array = NDArray[Any]


class Rule(ABC):
    """One optimizer's arithmetic. ``g`` may be overwritten; ``scratch`` has the shape of ``g``."""

    state_names: ClassVar[tuple[str, ...]] = ()
    #: Weight decay that acts on the parameters themselves, not through the gradient (AdamW).
    decoupled_decay: float = 0.0

    @abstractmethod
    def update(
        self,
        w: Array,
        g: Array,
        state: dict[str, Array],
        rate: float,
        step: int,
        out: Array,
        scratch: Array,
    ) -> None:
        """Write the new parameters to ``out`` and the new state in place.

        Args:
            w: parameters, read only.
            g: mean gradient with L2; may be used as scratch.
            state: this piece of each state vector.
            rate: learning rate of this step.
            step: updates before this one.
            out: new parameters.
            scratch: free to use.
        """


class SgdRule(Rule):
    """w ← w − η g."""

    def update(
        self,
        w: Array,
        g: Array,
        state: dict[str, Array],
        rate: float,
        step: int,
        out: Array,
        scratch: Array,
    ) -> None:
        """See ``Rule``."""
        np.multiply(g, g.dtype.type(rate), out=g)
        np.subtract(w, g, out=out)


class MomentumRule(Rule):
    """v ← μ v + g; w ← w − η v, or with Nesterov w ← w − η (g + μ v).

    Sutskever et al., "On the importance of initialization and momentum" (2013), in the form with
    the learning rate outside the velocity.
    """

    state_names = ("velocity",)

    def __init__(self, sgd: Sgd) -> None:
        self._momentum = sgd.momentum
        self._nesterov = sgd.nesterov

    def update(
        self,
        w: Array,
        g: Array,
        state: dict[str, Array],
        rate: float,
        step: int,
        out: Array,
        scratch: Array,
    ) -> None:
        """See ``Rule``."""
        real = g.dtype.type
        velocity = state["velocity"]
        np.multiply(velocity, real(self._momentum), out=velocity)
        np.add(velocity, g, out=velocity)
        if self._nesterov:
            np.multiply(velocity, real(self._momentum), out=scratch)
            np.add(scratch, g, out=scratch)
            np.multiply(scratch, real(rate), out=scratch)
        else:
            np.multiply(velocity, real(rate), out=scratch)
        np.subtract(w, scratch, out=out)


class AdagradRule(Rule):
    """s ← s + g²; w ← w − η g / (√s + ε). Duchi, Hazan, Singer (2011), diagonal form."""

    state_names = ("sum_of_squares",)

    def __init__(self, adagrad: Adagrad) -> None:
        self._epsilon = adagrad.epsilon

    def update(
        self,
        w: Array,
        g: Array,
        state: dict[str, Array],
        rate: float,
        step: int,
        out: Array,
        scratch: Array,
    ) -> None:
        """See ``Rule``."""
        real = g.dtype.type
        squares = state["sum_of_squares"]
        np.multiply(g, g, out=scratch)
        np.add(squares, scratch, out=squares)
        np.sqrt(squares, out=scratch)
        np.add(scratch, real(self._epsilon), out=scratch)
        np.multiply(g, real(rate), out=g)
        np.divide(g, scratch, out=g)
        np.subtract(w, g, out=out)


class AdamRule(Rule):
    """Adam: Kingma and Ba (2015), algorithm 1; AdamW: Loshchilov and Hutter (2019), algorithm 2.

    The decoupled decay of AdamW is applied by the caller where a tensor decays.
    """

    state_names = ("m", "v")

    def __init__(self, adam: Adam | AdamW) -> None:
        self._beta1 = adam.beta1
        self._beta2 = adam.beta2
        self._epsilon = adam.epsilon
        self.decoupled_decay = adam.weight_decay if isinstance(adam, AdamW) else 0.0

    def update(
        self,
        w: Array,
        g: Array,
        state: dict[str, Array],
        rate: float,
        step: int,
        out: Array,
        scratch: Array,
    ) -> None:
        """See ``Rule``."""
        real = g.dtype.type
        m, v = state["m"], state["v"]
        np.subtract(g, m, out=scratch)
        np.multiply(scratch, real(1.0 - self._beta1), out=scratch)
        np.add(m, scratch, out=m)
        np.multiply(g, g, out=g)
        np.subtract(g, v, out=g)
        np.multiply(g, real(1.0 - self._beta2), out=g)
        np.add(v, g, out=v)
        # m̂ / (√v̂ + ε) with the corrections c₁ and c₂ of the means' bias towards zero pulled out:
        # (√c₂ / c₁) · m / (√v + ε √c₂), two passes less.
        correction1 = 1.0 - self._beta1 ** (step + 1)
        root2 = math.sqrt(1.0 - self._beta2 ** (step + 1))
        np.sqrt(v, out=g)
        np.add(g, real(self._epsilon * root2), out=g)
        np.divide(m, g, out=g)
        np.multiply(g, real(rate * root2 / correction1), out=g)
        np.subtract(w, g, out=out)
