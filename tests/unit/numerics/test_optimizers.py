"""Update rules against longhand formulas, and independence of how the vector is cut."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.errors import InvalidArgument
from phalanx.optimizers import PIECE_ELEMENTS, build_optimizer, learning_rate
from phalanx.v1.job_spec_pb2 import Optimizer, Train

STEPS = 5
COUNT = 7
RATE = 0.05
L2 = 0.01

SPECS: dict[str, dict[str, Any]] = {
    "sgd": {"sgd": {"learning_rate": RATE}},
    "momentum": {"sgd": {"learning_rate": RATE, "momentum": 0.9}},
    "nesterov": {"sgd": {"learning_rate": RATE, "momentum": 0.9, "nesterov": True}},
    "adagrad": {"adagrad": {"learning_rate": RATE, "epsilon": 1e-10}},
    "adam": {"adam": {"learning_rate": RATE, "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8}},
    "adamw": {
        "adamw": {
            "learning_rate": RATE,
            "beta1": 0.9,
            "beta2": 0.999,
            "epsilon": 1e-8,
            "weight_decay": 0.1,
        }
    },
}


def longhand(name: str, w: float, gradients: list[float], decays: bool) -> float:
    """One element by the formulas of the papers, in Python floats."""
    v = m = s = 0.0
    for t, sum_ in enumerate(gradients, start=1):
        g = sum_ / COUNT + (L2 * w if decays else 0.0)
        if name == "sgd":
            w = w - RATE * g
        elif name in ("momentum", "nesterov"):
            v = 0.9 * v + g
            w = w - RATE * (g + 0.9 * v if name == "nesterov" else v)
        elif name == "adagrad":
            s += g * g
            w = w - RATE * g / (math.sqrt(s) + 1e-10)
        else:
            m = 0.9 * m + 0.1 * g
            s = 0.999 * s + 0.001 * g * g
            before = w
            w = w - RATE * (m / (1 - 0.9**t)) / (math.sqrt(s / (1 - 0.999**t)) + 1e-8)
            if name == "adamw" and decays:
                w -= RATE * 0.1 * before
    return w


def run(name: str, dtype: str, cuts: list[int], size: int = 40) -> np.ndarray:
    """Several steps, each cut applied separately, as ranges and frames are."""
    rng = np.random.default_rng(5)
    w = rng.standard_normal(size).astype(dtype)
    decay = np.arange(size) % 3 != 0
    optimizer = build_optimizer(Train(optimizer=SPECS[name], l2=L2), 0)
    state = {key: np.zeros(size, dtype) for key in optimizer.state_names}
    bounds = [0, *cuts, size]
    for step in range(STEPS):
        gradient = rng.standard_normal(size).astype(dtype)
        out = np.empty_like(w)
        for first, stop in itertools.pairwise(bounds):
            piece = slice(first, stop)
            pieces = {key: vector[piece] for key, vector in state.items()}
            optimizer.apply(
                w[piece], gradient[piece], COUNT, decay[piece], pieces, step, out[piece]
            )
        w = out
    return w


@pytest.mark.parametrize("name", SPECS)
def test_every_rule_follows_its_formula(name: str) -> None:
    got = run(name, "float64", [])
    rng = np.random.default_rng(5)
    start = rng.standard_normal(40)
    gradients = [rng.standard_normal(40) for _ in range(STEPS)]
    expected = [longhand(name, start[i], [g[i] for g in gradients], i % 3 != 0) for i in range(40)]
    np.testing.assert_allclose(got, expected, rtol=1e-12)


@pytest.mark.parametrize("name", SPECS)
@given(cuts=st.lists(st.integers(1, 39), max_size=5, unique=True))
@settings(max_examples=15, deadline=None)
def test_the_bits_do_not_depend_on_how_the_vector_is_cut(name: str, cuts: list[int]) -> None:
    whole = run(name, "float32", [])
    assert run(name, "float32", sorted(cuts)).tobytes() == whole.tobytes()


def test_the_bits_do_not_depend_on_the_position_within_a_large_vector() -> None:
    size = 70_001
    whole = run("adam", "float32", [], size)
    assert run("adam", "float32", [16_384, 33_333, 65_536], size).tobytes() == whole.tobytes()


def test_gradient_descent_on_a_parabola_has_a_closed_form() -> None:
    optimizer = build_optimizer(Train(optimizer=SPECS["sgd"]), 0)
    curvature = np.array([1.0, 3.0, 10.0])
    start = np.array([4.0, -2.0, 1.0])
    w = start
    for step in range(20):
        out = np.empty(3)
        optimizer.apply(w, 5 * curvature * w, 5, None, {}, step, out)
        w = out
    np.testing.assert_allclose(w, start * (1 - RATE * curvature) ** 20, rtol=1e-13)


def test_under_a_constant_gradient_every_rule_has_a_closed_form() -> None:
    steps, g = 25, np.array([0.3, -2.0, 7.0])
    mu, sign = 0.9, np.sign(g)
    summed = sum((1 - mu ** (t + 1)) / (1 - mu) for t in range(steps))
    distances = {
        "sgd": RATE * steps * g,
        "momentum": RATE * summed * g,
        "nesterov": RATE * (steps + mu * summed) * g,
        "adagrad": RATE * sum(1 / math.sqrt(t + 1) for t in range(steps)) * sign,
        "adam": RATE * steps * sign,
    }
    for name, distance in distances.items():
        optimizer = build_optimizer(Train(optimizer=SPECS[name]), 0)
        state = {key: np.zeros(3) for key in optimizer.state_names}
        w = np.ones(3)
        for step in range(steps):
            out = np.empty(3)
            optimizer.apply(w, g, 1, None, state, step, out)
            w = out
        np.testing.assert_allclose(1 - w, distance, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", SPECS)
def test_float32_is_close_to_float64_and_stays_what_it_is(name: str) -> None:
    single, double = run(name, "float32", []), run(name, "float64", [])
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, double, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_decay_everywhere_nowhere_and_in_between_agree(name: str) -> None:
    """Whole pieces take a shorter way than mixed ones; the bits are the same."""
    size = 3 * PIECE_ELEMENTS
    rng = np.random.default_rng(0)
    w, g = rng.standard_normal((2, size)).astype(np.float32)
    optimizer = build_optimizer(Train(optimizer=SPECS[name], l2=L2), 0)

    def apply(decay: np.ndarray | None) -> np.ndarray:
        state = {key: np.zeros(size, np.float32) for key in optimizer.state_names}
        out = np.empty_like(w)
        optimizer.apply(w, g, COUNT, decay, state, 0, out)
        return out

    everywhere, nowhere = apply(np.ones(size, np.bool_)), apply(None)
    assert not np.array_equal(everywhere, nowhere)
    assert apply(np.zeros(size, np.bool_)).tobytes() == nowhere.tobytes()
    # The first piece decays, the second in part, the third not at all.
    border = PIECE_ELEMENTS + 12_345
    mixed = apply(np.arange(size) < border)
    assert mixed[:border].tobytes() == everywhere[:border].tobytes()
    assert mixed[border:].tobytes() == nowhere[border:].tobytes()


def test_an_overflow_is_left_in_the_result_without_a_warning() -> None:
    optimizer = build_optimizer(Train(optimizer={"sgd": {"learning_rate": 1.0}}), 0)
    big, out = np.full(2, 3e38, np.float32), np.empty(2, np.float32)
    optimizer.apply(-big, big, 1, None, {}, 0, out)
    assert np.isneginf(out).all()


def test_inputs_stay_as_they_are() -> None:
    optimizer = build_optimizer(Train(optimizer=SPECS["adam"]), 0)
    w, g = np.ones(5, np.float32), np.ones(5, np.float32)
    w.flags.writeable = g.flags.writeable = False
    state = {key: np.zeros(5, np.float32) for key in optimizer.state_names}
    out = np.empty(5, np.float32)
    optimizer.apply(w, g, 2, None, state, 0, out)
    assert (out < 1).all()


def test_an_empty_step_is_refused() -> None:
    optimizer = build_optimizer(Train(optimizer=SPECS["sgd"]), 0)
    one = np.ones(1)
    with pytest.raises(InvalidArgument, match="at least 1 example"):
        optimizer.apply(one, one, 0, None, {}, 0, np.empty(1))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"constant": {}}, {0: 1.0, 99: 1.0}),
        ({"step": {"every_steps": 10, "factor": 0.5}}, {9: 1.0, 10: 0.5, 25: 0.25}),
        ({"cosine": {"final_fraction": 0.1}}, {0: 1.0, 50: 0.55, 100: 0.1}),
        ({"inverse_time": {"decay": 0.1}}, {0: 1.0, 10: 0.5}),
        ({"constant": {}, "warm_up_steps": 4}, {0: 0.25, 3: 1.0, 4: 1.0}),
        ({"step": {"every_steps": 10, "factor": 0.5}, "warm_up_steps": 5}, {14: 1.0, 15: 0.5}),
    ],
)
def test_schedules(schedule: dict[str, Any], expected: dict[int, float]) -> None:
    optimizer = Optimizer(sgd={"learning_rate": 1.0}, schedule=schedule)
    for step, rate in expected.items():
        assert learning_rate(optimizer, step, 100) == pytest.approx(rate)


def test_pegasos_divides_by_its_updates() -> None:
    """w <- (1 - 1/t) w - g / (l2 t), where the bias does not shrink."""
    optimizer = build_optimizer(Train(optimizer={"pegasos": {}}, l2=0.25), 0)
    decay = np.array([True, True, False])
    w, g = np.array([3.0, -1.0, 2.0]), np.array([6.0, 2.0, 4.0])
    out = np.empty(3)
    for update, (first, rest) in {0: (0.0, 1.0), 1: (0.5, 0.5), 9: (0.9, 0.1)}.items():
        optimizer.apply(w, g, 2, decay, {}, update, out)
        np.testing.assert_allclose(out[:2], first * w[:2] - rest * g[:2] / 2 / 0.25, rtol=1e-14)
        assert out[2] == pytest.approx(w[2] - rest * g[2] / 2 / 0.25)
    # Where a step is several updates, each is an iteration: the step does not matter.
    again = np.empty(3)
    optimizer.apply(w, g, 2, decay, {}, 1, again, update=9)
    assert again.tobytes() == out.tobytes()
    optimizer.apply(w, g, 2, decay, {}, 1, again, update=9, rate_scale=0.5)
    np.testing.assert_allclose(again, (w + out) / 2, rtol=1e-14)
