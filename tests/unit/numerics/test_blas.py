"""One BLAS thread: limiting it at run time gives the bits of the environment variables."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from phalanx import blas
from phalanx.errors import FailedPrecondition

REPOSITORY = Path(__file__).resolve().parents[3]

two_cores = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="on one core BLAS never uses two threads"
)

PRODUCTS = """
import hashlib
import numpy as np

def products():
    digest = hashlib.sha256()
    random = np.random.Generator(np.random.Philox(1))
    for rows, inner, columns in ((64, 784, 128), (256, 784, 128), (33, 17, 5), (600, 600, 600)):
        for dtype in ("float32", "float64"):
            a = random.random((rows, inner)).astype(dtype)
            b = random.random((inner, columns)).astype(dtype)
            for result in (a @ b, a.T @ a[:, :7], a @ b[:, 0], a.T @ a[:, 0]):
                digest.update(result.tobytes())
    return digest.hexdigest()
"""


def in_new_process(code: str, **environment: str) -> str:
    """What a program prints; NumPy is imported under the given environment."""
    inherited = {name: value for name, value in os.environ.items() if name not in blas.ENVIRONMENT}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**inherited, "PYTHONPATH": str(REPOSITORY), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


LIMITED = f"""{PRODUCTS}
from threadpoolctl import threadpool_info
from phalanx.blas import one_blas_thread
assert [library["num_threads"] for library in threadpool_info()] == [2], "nothing to limit"
with one_blas_thread():
    print(products())
"""


@two_cores
def test_limiting_at_run_time_gives_the_bits_of_the_environment() -> None:
    alone = in_new_process(f"{PRODUCTS}\nprint(products())", **blas.ENVIRONMENT)
    assert in_new_process(LIMITED, OPENBLAS_NUM_THREADS="2") == alone


def threads() -> set[int]:
    return {library["num_threads"] for library in threadpool_info() if is_blas(library)}


def is_blas(library: dict[str, Any]) -> bool:
    return bool(library["user_api"] == "blas")


def test_the_limit_ends_with_the_body() -> None:
    with threadpool_limits(2, user_api="blas"):
        before = threads()
        with blas.one_blas_thread():
            assert threads() == {1}
            blas.require_one_thread()
        assert threads() == before


@two_cores
def test_several_threads_are_refused_with_what_to_do() -> None:
    with threadpool_limits(2, user_api="blas"), pytest.raises(FailedPrecondition) as caught:
        blas.require_one_thread()
    assert caught.value.reason == "BLAS_THREADS"
    assert "OPENBLAS_NUM_THREADS=1" in caught.value.message


class FakeController:
    """threadpoolctl of a machine with another BLAS."""

    def __init__(self, *libraries: dict[str, Any]) -> None:
        self._libraries = [
            {"user_api": "blas", "internal_api": "openblas", "version": "9", **library}
            for library in libraries
        ]

    def select(self, user_api: str) -> "FakeController":
        assert user_api == "blas"
        return self

    def info(self) -> list[dict[str, Any]]:
        return self._libraries

    @contextmanager
    def limit(self, limits: int) -> Iterator[None]:
        assert limits == 1
        yield


def test_a_blas_that_cannot_be_limited_for_certain_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    openmp = FakeController({"num_threads": 4, "threading_layer": "openmp"})
    monkeypatch.setattr(blas, "ThreadpoolController", lambda: openmp)
    with pytest.raises(FailedPrecondition, match="before Python starts"), blas.one_blas_thread():
        pass


def test_one_thread_from_the_start_is_good_enough_for_any_blas(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    openmp = FakeController(
        {"num_threads": 1, "threading_layer": "openmp"}, {"num_threads": None, "version": None}
    )
    monkeypatch.setattr(blas, "ThreadpoolController", lambda: openmp)
    with blas.one_blas_thread():
        blas.require_one_thread()


def test_an_environment_is_pinned_over_what_it_said() -> None:
    environ = {"OMP_NUM_THREADS": "8", "HOME": "/"}
    blas.pin_one_thread(environ)
    assert environ == {"HOME": "/", **dict.fromkeys(blas.ENVIRONMENT, "1")}
