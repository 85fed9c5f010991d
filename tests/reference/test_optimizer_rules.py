"""Update rules against another implementation of them, that of scikit-learn."""

import numpy as np
import pytest
from sklearn.neural_network._stochastic_optimizers import AdamOptimizer, SGDOptimizer

from phalanx.optimizers import build_optimizer
from phalanx.v1.job_spec_pb2 import Train

STEPS, SIZE, RATE = 30, 50, 0.03


def gradients() -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.standard_normal(SIZE) for _ in range(STEPS)]


def ours(optimizer: dict[str, object]) -> np.ndarray:
    rule = build_optimizer(Train(optimizer=optimizer), 0)
    w = np.linspace(-1, 1, SIZE)
    state = {name: np.zeros(SIZE) for name in rule.state_names}
    for step, gradient in enumerate(gradients()):
        out = np.empty(SIZE)
        rule.apply(w, 4 * gradient, 4, None, state, step, out)
        w = out
    return w


def theirs(optimizer: AdamOptimizer | SGDOptimizer, w: np.ndarray) -> np.ndarray:
    for gradient in gradients():
        optimizer.update_params([w], [gradient])
    return w


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_sgd(momentum: float, nesterov: bool) -> None:
    w = np.linspace(-1, 1, SIZE)
    reference = SGDOptimizer(
        [w], learning_rate_init=RATE, momentum=momentum, nesterov=nesterov and momentum > 0
    )
    sgd = {"learning_rate": RATE, "momentum": momentum, "nesterov": nesterov}
    np.testing.assert_allclose(ours({"sgd": sgd}), theirs(reference, w), rtol=1e-11)


def test_adam() -> None:
    w = np.linspace(-1, 1, SIZE)
    # scikit-learn adds ε before the correction of the bias; so small a one makes no difference.
    constants = {"beta1": 0.8, "beta2": 0.95, "epsilon": 1e-15}
    reference = AdamOptimizer(
        [w], RATE, constants["beta1"], constants["beta2"], constants["epsilon"]
    )
    adam = {"learning_rate": RATE, **constants}
    np.testing.assert_allclose(ours({"adam": adam}), theirs(reference, w), rtol=1e-11)
