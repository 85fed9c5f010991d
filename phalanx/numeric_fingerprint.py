"""What a machine computes, as one hash: equal fingerprints, equal bits.

NumPy and OpenBLAS choose kernels by CPU, and kernels differ in the last bits. A job that promises
bit-identical results therefore runs on members with one fingerprint. It covers the results of
matrix products, reductions, elementary functions, an optimizer and a leaf in both dtypes, and the
versions of the libraries that make them. What it does not compute here it names, by
the version of the rules of training.
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from phalanx.blas import require_one_thread
from phalanx.models import DataSchema, build_model
from phalanx.models.base import Batch
from phalanx.optimizers import build_optimizer
from phalanx.rules import RULES
from phalanx.v1.job_spec_pb2 import JobSpec

if TYPE_CHECKING:
    from hashlib import _Hash

Array = NDArray[Any]

_LIBRARIES = ("numpy", "scipy")
_SEED = 0x9E3779B97F4A7C15
#: (rows, inner, columns); small and large products take different kernels.
_PRODUCTS = ((7, 3, 5), (64, 784, 33), (256, 128, 10))


@cache
def compute() -> str:
    """Return the fingerprint of this process, as hex SHA-256; computed once.

    Raises FailedPrecondition where BLAS may use several threads, since then nothing is
    reproducible: set `phalanx.blas.ENVIRONMENT` before NumPy is imported.
    """
    require_one_thread()
    digest = hashlib.sha256(f"rules {RULES}\n".encode())
    for library in _LIBRARIES:
        digest.update(f"{library} {_version(library)}\n".encode())
    for dtype in ("float32", "float64"):
        _add_products(digest, dtype)
        _add_functions(digest, dtype)
        _add_leaf(digest, dtype)
    return digest.hexdigest()


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "none"


def _numbers(count: int, dtype: str, stream: int) -> Array:
    """Numbers in [-1, 1) made of integers alone, so that making them cannot differ."""
    raw = np.random.Philox(key=np.array([_SEED, stream], np.uint64)).random_raw(count)
    return ((raw >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1.0).astype(dtype)


def _add(digest: _Hash, values: Array) -> None:
    digest.update(values.tobytes())


def _add_products(digest: _Hash, dtype: str) -> None:
    for stream, (rows, inner, columns) in enumerate(_PRODUCTS):
        left = _numbers(rows * inner, dtype, 2 * stream).reshape(rows, inner)
        right = _numbers(inner * columns, dtype, 2 * stream + 1).reshape(inner, columns)
        product = left @ right
        for result in (product, left.T @ product, left @ right[:, 0].copy(), left.T @ left[:, 0]):
            _add(digest, result)
        _add(digest, np.dot(left.ravel(), left.ravel()).reshape(1))


def _add_functions(digest: _Hash, dtype: str) -> None:
    values = _numbers(1031, dtype, 100) * 20
    positive = np.abs(values) + np.asarray(0.001, dtype)
    for result in (
        np.exp(values),
        np.log(positive),
        np.log1p(positive),
        np.sqrt(positive),
        np.tanh(values),
        values / positive,
    ):
        _add(digest, result)
    table = values[:1024].reshape(64, 16)
    for result in (table.sum(axis=0), table.sum(axis=1), table.max(axis=1)):
        _add(digest, result)
    _add(digest, np.array([values.sum(), values.sum(dtype=np.float64)], np.float64))


def _add_leaf(digest: _Hash, dtype: str) -> None:
    spec = JobSpec(name="fingerprint")
    spec.train.dtype = dtype
    spec.train.model.mlp.hidden.append(24)
    spec.train.l2 = 0.001
    adam = spec.train.optimizer.adam
    adam.learning_rate, adam.beta1, adam.beta2, adam.epsilon = 0.01, 0.9, 0.999, 1e-8
    model = build_model(spec, DataSchema(features=40, classes=7, dtype=dtype))
    rows = 100
    batch = Batch(
        features=_numbers(rows * 40, dtype, 200).reshape(rows, 40),
        targets=np.arange(rows, dtype=np.int64) % 7,
    )
    parameters = _numbers(model.layout.element_count, dtype, 201)
    gradient = np.empty_like(parameters)
    sums = model.gradient(parameters, batch, gradient)
    _add(digest, gradient)
    _add(digest, np.array([sums.loss_sum, *model.evaluate(parameters, batch)]))
    optimizer = build_optimizer(spec.train, total_steps=10)
    state = {name: np.zeros_like(parameters) for name in optimizer.state_names}
    decay = np.ones(len(parameters), np.bool_)
    updated = np.empty_like(parameters)
    for step in range(2):
        optimizer.apply(parameters, gradient, sums.count, decay, state, step, updated)
        _add(digest, updated)
