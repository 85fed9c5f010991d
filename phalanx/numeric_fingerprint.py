"""Which bits this machine's arithmetic makes.

NumPy and OpenBLAS choose kernels by CPU, version and number of threads, and their results differ in
the last bits. Two processes with equal fingerprints compute equal leaves.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator

import numpy as np

from phalanx.errors import FailedPrecondition
from phalanx.models import Batch, DataSchema, Model, build_model
from phalanx.models.base import Array
from phalanx.v1.job_spec_pb2 import JobSpec

THREAD_VARIABLES = (
    "OPENBLAS_NUM_THREADS",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)
"""Must all be 1 before NumPy is imported: products by two threads have other bits."""


def compute() -> str:
    """Return the hash of golden results in float32 and float64, and of the NumPy version.

    Raises FailedPrecondition where BLAS may use several threads.
    """
    wrong = [name for name in THREAD_VARIABLES if os.environ.get(name) != "1"]
    if wrong:
        raise FailedPrecondition(
            f"the numeric fingerprint needs {wrong[0]}=1, set before NumPy is imported; leaf "
            "processes are started that way",
            reason="BLAS_THREADS",
        )
    digest = hashlib.sha256(np.__version__.encode())
    for dtype in ("float32", "float64"):
        for result in _golden(dtype):
            digest.update(np.ascontiguousarray(result).tobytes())
    return digest.hexdigest()


def _golden(dtype: str) -> Iterator[Array]:
    """Yield results of everything that leaves are made of, in shapes for different kernels."""
    random = np.random.Generator(np.random.Philox(key=7))
    for rows, inner, columns in ((64, 784, 128), (7, 33, 5), (256, 100, 10)):
        left = random.standard_normal((rows, inner)).astype(dtype)
        right = random.standard_normal((inner, columns)).astype(dtype)
        yield left @ right
        yield left.T @ left[:, :3]
        yield left @ right[:, 0]
    values = random.standard_normal(10_007).astype(dtype)
    yield from (np.exp(values), np.log1p(np.abs(values)), np.tanh(values), np.sqrt(np.abs(values)))
    yield np.array([values.sum(), np.dot(values, values), values.sum(dtype=np.float64)])
    yield from _golden_leaf(dtype, random)


def _golden_leaf(dtype: str, random: np.random.Generator) -> Iterator[Array]:
    spec = JobSpec()
    spec.train.model.mlp.hidden.append(32)
    model: Model = build_model(spec, DataSchema(features=50, classes=4, dtype=dtype))
    features = random.standard_normal((200, 50)).astype(dtype)
    targets = random.integers(0, 4, 200)
    parameters = model.initial_parameters(1)
    out = np.empty_like(parameters)
    sums = model.gradient(parameters, Batch(features, targets), out)
    yield out
    yield np.array([sums.loss_sum])
