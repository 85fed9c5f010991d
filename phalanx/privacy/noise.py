"""The noise of a private job: Gaussian, added once to the sum of a step, at the root.

It is keyed by (secret, step, block of 65,536 elements), so that a step that is computed again, by
whomever and in whatever ranges, gets the same noise: of two results with different noise the mean
would tell more than one of them. The numbers come of SHAKE-256, not of a generator for simulations,
and become normal by arithmetic and one logarithm, which numeric fingerprints cover: members of one
fingerprint make the same bits.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.errors import FailedPrecondition
from phalanx.frames import BLOCK_ELEMENTS
from phalanx.privacy.secret import SECRET_BYTES, noise_key
from phalanx.privacy.settings import expected_batch
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import JobPlan

Array = NDArray[Any]
Float64 = NDArray[np.float64]

_STREAM = b"gradient"
_UNIFORM_BITS = 52

# Wichura, "Algorithm AS 241: the percentage points of the normal distribution" (1988), PPND16:
# quotients of polynomials around the middle, in the tails and far out, highest power first.
_MIDDLE = (
    2.5090809287301226727e3,
    3.3430575583588128105e4,
    6.7265770927008700853e4,
    4.5921953931549871457e4,
    1.3731693765509461125e4,
    1.9715909503065514427e3,
    1.3314166789178437745e2,
    3.3871328727963666080e0,
)
_MIDDLE_BELOW = (
    5.2264952788528545610e3,
    2.8729085735721942674e4,
    3.9307895800092710610e4,
    2.1213794301586595867e4,
    5.3941960214247511077e3,
    6.8718700749205790830e2,
    4.2313330701600911252e1,
    1.0,
)
_TAIL = (
    7.74545014278341407640e-4,
    2.27238449892691845833e-2,
    2.41780725177450611770e-1,
    1.27045825245236838258e0,
    3.64784832476320460504e0,
    5.76949722146069140550e0,
    4.63033784615654529590e0,
    1.42343711074968357734e0,
)
_TAIL_BELOW = (
    1.05075007164441684324e-9,
    5.47593808499534494600e-4,
    1.51986665636164571966e-2,
    1.48103976427480074590e-1,
    6.89767334985100004550e-1,
    1.67638483018380384940e0,
    2.05319162663775882187e0,
    1.0,
)
_FAR = (
    2.01033439929228813265e-7,
    2.71155556874348757815e-5,
    1.24266094738807843860e-3,
    2.65321895265761230930e-2,
    2.96560571828504891230e-1,
    1.78482653991729133580e0,
    5.46378491116411436990e0,
    6.65790464350110377720e0,
)
_FAR_BELOW = (
    2.04426310338993978564e-15,
    1.42151175831644588870e-7,
    1.84631831751005468180e-5,
    7.86869131145613259100e-4,
    1.48753612908506148525e-2,
    1.36929880922735805310e-1,
    5.99832206555887937690e-1,
    1.0,
)

Coefficients = tuple[float, ...]


class GradientNoise:
    """What makes the sum of a step private.

    Attributes:
        divisor: examples that a step is expected to have; what it has had tells of the rows.
    """

    def __init__(self, plan: JobPlan, secret: bytes) -> None:
        """Raises FailedPrecondition for a secret that is none."""
        if len(secret) != SECRET_BYTES:
            raise FailedPrecondition(
                f"job {plan.job_id} is private, and whoever assigned it gave no secret for its "
                "noise; bring all members to one version",
                reason="NO_SECRET",
            )
        train = JobSpec.FromString(plan.spec).train
        self.divisor = expected_batch(train, plan.train_rows)
        self._deviation = train.privacy.noise_multiplier * train.privacy.clip_norm
        self._key = noise_key(secret)

    def added(
        self, gradient_sum: Array | None, first: int, count: int, step: int, dtype: np.dtype[Any]
    ) -> Array:
        """Return elements [first, first + count) of a step's sum with their noise.

        ``gradient_sum`` is None where no row was drawn: that is nobody's business either.
        """
        total = np.zeros(count) if gradient_sum is None else gradient_sum.astype(np.float64)
        stop = first + count
        for block in range(first // BLOCK_ELEMENTS, -(-stop // BLOCK_ELEMENTS)):
            start = block * BLOCK_ELEMENTS
            low, high = max(first, start), min(stop, start + BLOCK_ELEMENTS)
            numbers = self._block(step, block, high - start)[low - start :]
            total[low - first : high - first] += numbers * self._deviation
        return total.astype(dtype)

    def _block(self, step: int, block: int, count: int) -> Float64:
        """The first so many numbers of a block."""
        text = self._key + _STREAM + struct.pack("<QQ", step, block)
        words = np.frombuffer(hashlib.shake_256(text).digest(8 * count), "<u8")
        return standard_normal(words)


def standard_normal(words: NDArray[np.uint64]) -> Float64:
    """Return a standard normal number for each random word."""
    uniform = (words >> np.uint64(64 - _UNIFORM_BITS)).astype(np.float64)
    uniform = (uniform + 0.5) * 2.0**-_UNIFORM_BITS
    centred = uniform - 0.5
    numbers = centred * _quotient(_MIDDLE, _MIDDLE_BELOW, 0.180625 - centred * centred)
    outside = np.flatnonzero(np.abs(centred) > 0.425)
    side = centred[outside]
    root = np.sqrt(-np.log(np.where(side < 0, uniform[outside], 1.0 - uniform[outside])))
    distance = _quotient(_TAIL, _TAIL_BELOW, root - 1.6)
    far = np.flatnonzero(root > 5.0)
    distance[far] = _quotient(_FAR, _FAR_BELOW, root[far] - 5.0)
    numbers[outside] = np.copysign(distance, side)
    return numbers


def _quotient(above: Coefficients, below: Coefficients, x: Float64) -> Float64:
    value, divisor = np.full_like(x, above[0]), np.full_like(x, below[0])
    for number, coefficients in ((value, above), (divisor, below)):
        for each in coefficients[1:]:
            np.multiply(number, x, out=number)
            np.add(number, each, out=number)
    return np.divide(value, divisor, out=value)


def build_noise(plan: JobPlan, secret: bytes) -> GradientNoise | None:
    """Return the noise of a job; None: it is not private."""
    if not JobSpec.FromString(plan.spec).train.HasField("privacy"):
        return None
    return GradientNoise(plan, secret)
