"""How much privacy a job has spent: Rényi differential privacy of the subsampled Gaussian.

Each step draws every row with probability q, and adds noise of σ times the bound of a row. Mironov,
Talwar and Zhang, "Rényi differential privacy of the sampled Gaussian mechanism" (2019), bound what
a step tells of a row, for each order α; over steps the bounds add up. They become (ε, δ) by
ε = T · RDP(α) + log(1/δ) / (α − 1) at the best order (Mironov 2017, proposition 3). Two data sets
are neighbours where one has a row more.

Plain Python, since services that have no arrays ask for it, too.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import count

ORDERS = (
    *(1.0 + tenths / 10.0 for tenths in range(5, 100)),
    *(float(order) for order in range(11, 65)),
    *(80.0, 96.0, 128.0, 192.0, 256.0, 384.0, 512.0),
)
"""Any order gives a bound; these leave hardly anything to a better one."""

STEPS_MAX = 2**53 - 1

_SERIES_ENDS = -30.0
"""Log of a term that changes nothing any more, beside a sum of 1 or more."""

_LEAST_SIGMA, _MOST_SIGMA = 1e-30, 1e50
"""Beyond them powers of σ are no numbers any more; nothing is promised there."""

_ERFC_DIRECT = 25.0
"""Beyond it erfc comes near the smallest numbers, and its asymptotic series is exact."""


class Accountant:
    """What the steps of one job cost.

    Args:
        rate: probability with which a row enters a step, above 0 and at most 1.
        noise_multiplier: deviation of the noise, in units of the clipping norm.
        delta: probability with which the bound may fail, above 0 and below 1.
    """

    def __init__(self, rate: float, noise_multiplier: float, delta: float) -> None:
        self._costs = [
            (cost, math.log(1.0 / delta) / (order - 1.0))
            for order, cost in zip(ORDERS, _costs(rate, noise_multiplier), strict=True)
            if math.isfinite(cost)
        ]

    def epsilon(self, steps: int) -> float:
        """Return ε after so many steps: 0 after none, infinite where no order bounds it."""
        if steps < 1:
            return 0.0
        bounds = (steps * cost + conversion for cost, conversion in self._costs)
        return min(bounds, default=math.inf)

    def steps_within(self, epsilon: float) -> int:
        """Return the most steps that spend no more than ``epsilon``; 0: not even one."""
        most = 0
        for cost, conversion in self._costs:
            left = epsilon - conversion
            if left > 0:
                most = max(most, int(min(STEPS_MAX, left / cost)) if cost > 0 else STEPS_MAX)
        # Rounding may have taken the quotient to the next whole number.
        while most > 0 and self.epsilon(most) > epsilon:
            most -= 1
        return most


@lru_cache(maxsize=64)
def _costs(rate: float, sigma: float) -> tuple[float, ...]:
    """The Rényi divergence of one step, by order."""
    if not _LEAST_SIGMA < sigma < _MOST_SIGMA:
        return (math.inf,) * len(ORDERS)
    if rate >= 1.0:
        return tuple(order / (2.0 * sigma**2) for order in ORDERS)
    return tuple(max(0.0, _log_moment(rate, sigma, order)) / (order - 1.0) for order in ORDERS)


def _log_moment(rate: float, sigma: float, order: float) -> float:
    """log of the α-th moment of the ratio of densities, E[(1 − q + q e^((2z − 1) / 2σ²))^α]."""
    if order.is_integer():
        return _log_moment_of_integer(rate, sigma, int(order))
    return _log_moment_of_fraction(rate, sigma, order)


def _log_moment_of_integer(rate: float, sigma: float, order: int) -> float:
    """Section 3.3 of Mironov et al.: the binomial sum."""
    log_rate, log_rest = math.log(rate), math.log1p(-rate)
    terms = [
        math.lgamma(order + 1)
        - math.lgamma(k + 1)
        - math.lgamma(order - k + 1)
        + k * log_rate
        + (order - k) * log_rest
        + k * (k - 1) / (2.0 * sigma**2)
        for k in range(order + 1)
    ]
    largest = max(terms)
    return largest + math.log(math.fsum(math.exp(term - largest) for term in terms))


def _log_moment_of_fraction(rate: float, sigma: float, order: float) -> float:
    """The same by two series, on either side of where the two densities weigh the same.

    The binomial coefficients of a fraction change their signs from the order on, so that the
    series alternate and the last term bounds what is left out.
    """
    log_rate, log_rest = math.log(rate), math.log1p(-rate)
    border = sigma**2 * (log_rest - log_rate) + 0.5
    scale = math.sqrt(2.0) * sigma
    log_size, sign = 0.0, 1.0
    total, largest = 0.0, -math.inf
    for k in count():
        rest = order - k
        low = (
            log_size
            + k * log_rate
            + rest * log_rest
            + k * (k - 1) / (2.0 * sigma**2)
            + _log_half_erfc((k - border) / scale)
        )
        high = (
            log_size
            + rest * log_rate
            + k * log_rest
            + rest * (rest - 1) / (2.0 * sigma**2)
            + _log_half_erfc((border - rest) / scale)
        )
        peak = max(largest, low, high)
        kept = total * math.exp(largest - peak) if total else 0.0
        total = kept + sign * (math.exp(low - peak) + math.exp(high - peak))
        largest = peak
        if k > order and max(low, high) < _SERIES_ENDS:
            return largest + math.log(total) if total > 0.0 else math.inf
        log_size += math.log(abs(rest)) - math.log(k + 1)
        sign = math.copysign(sign, sign * rest)
    raise AssertionError("the series has no end")


def _log_half_erfc(x: float) -> float:
    """log(erfc(x) / 2)."""
    if x < _ERFC_DIRECT:
        return math.log(math.erfc(x)) - math.log(2.0)
    square = x * x
    series = 1.0 - 0.5 / square + 0.75 / square**2 - 1.875 / square**3
    return -square - math.log(2.0 * x * math.sqrt(math.pi)) + math.log(series)
