"""What the steps of a private job cost, against published and analytic values."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.privacy.accountant import STEPS_MAX, Accountant

DELTA = 1e-5


@pytest.mark.parametrize(
    ("sigma", "epochs", "epsilon"), [(1.12, 60, 2.92), (0.6, 30, 9.74), (1.2, 10, 1.20)]
)
def test_the_values_that_tensorflow_privacy_publishes(
    sigma: float, epochs: int, epsilon: float
) -> None:
    steps = epochs * 60_000 // 256
    spent = Accountant(256 / 60_000, sigma, DELTA).epsilon(steps)
    assert spent == pytest.approx(epsilon, rel=0.005)


def rdp_by_integration(rate: float, sigma: float, order: float) -> float:
    """The larger of the two divergences, from the definition."""
    z = np.linspace(-60 * sigma, 60 * sigma + order, 2_000_001)
    log_base = -(z**2) / (2 * sigma**2) - math.log(sigma * math.sqrt(2 * math.pi))
    log_ratio = np.logaddexp(math.log1p(-rate), math.log(rate) + (2 * z - 1) / (2 * sigma**2))
    moment = np.trapezoid(np.exp(log_base + order * log_ratio), z)
    return float(math.log(moment) / (order - 1))


@pytest.mark.parametrize("order", [1.5, 2.0, 2.5, 7.0, 7.9, 20.0])
@pytest.mark.parametrize(("rate", "sigma"), [(0.01, 1.0), (0.3, 2.0), (0.05, 0.8)])
def test_each_order_is_the_divergence_by_its_definition(
    monkeypatch: pytest.MonkeyPatch, rate: float, sigma: float, order: float
) -> None:
    from phalanx.privacy import accountant

    monkeypatch.setattr(accountant, "ORDERS", (order,))
    accountant._costs.cache_clear()
    try:
        spent = Accountant(rate, sigma, DELTA).epsilon(1) - math.log(1 / DELTA) / (order - 1)
    finally:
        accountant._costs.cache_clear()
    assert spent == pytest.approx(rdp_by_integration(rate, sigma, order), rel=1e-6, abs=1e-9)


def test_without_sampling_it_is_the_gaussian_mechanism() -> None:
    sigma, steps = 40.0, 10
    # The best real order is 1 + sqrt(2 σ² log(1/δ) / T).
    variance = 2 * sigma**2 / steps
    best = 1 / variance + 2 * math.sqrt(math.log(1 / DELTA) / variance)
    assert Accountant(1.0, sigma, DELTA).epsilon(steps) == pytest.approx(best, rel=1e-3)


@settings(max_examples=15, deadline=None)
@given(
    st.floats(1e-4, 1.0),
    st.floats(0.4, 8.0),
    st.floats(1e-9, 1e-3),
    st.floats(0.05, 50.0),
)
def test_the_steps_that_are_allowed_are_the_last_ones_within_the_bound(
    rate: float, sigma: float, delta: float, bound: float
) -> None:
    accountant = Accountant(rate, sigma, delta)
    steps = accountant.steps_within(bound)
    assert accountant.epsilon(steps) <= bound < accountant.epsilon(steps + 1)


@given(st.floats(1e-6, 1.0), st.floats(1e-3, 1e3), st.integers(1, 10**9))
@settings(max_examples=15, deadline=None)
def test_more_steps_never_cost_less_and_more_noise_never_more(
    rate: float, sigma: float, steps: int
) -> None:
    spent = Accountant(rate, sigma, DELTA).epsilon(steps)
    assert 0 < spent <= Accountant(rate, sigma, DELTA).epsilon(steps + 1)
    assert Accountant(rate, sigma * 1.01, DELTA).epsilon(steps) <= spent * (1 + 1e-9)


def test_no_step_costs_nothing() -> None:
    assert Accountant(0.01, 1.0, DELTA).epsilon(0) == 0.0


@pytest.mark.parametrize("rate", [1e-9, 0.01, 1.0])
@pytest.mark.parametrize("sigma", [1e-320, 1e-140, 1e-29, 1e-3, 1e3, 1e40, 1e60, 1e200])
def test_no_noise_is_too_small_or_too_large_to_be_judged(rate: float, sigma: float) -> None:
    accountant = Accountant(rate, sigma, 1e-5)
    assert accountant.epsilon(1) > 0
    assert 0 <= accountant.steps_within(1e308) <= STEPS_MAX
    assert accountant.steps_within(1e-9) == 0
