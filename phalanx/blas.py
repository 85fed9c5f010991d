"""How many threads BLAS uses, which decides the last bits of every matrix product.

A product that is split over threads is summed in another order than one that is not. Everything
that must be reproducible therefore runs with one BLAS thread. Service processes set it in their
environment before NumPy is imported, which every BLAS honours; `one_blas_thread` does it for a
process that imported NumPy long ago, such as a notebook.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

from threadpoolctl import ThreadpoolController

from phalanx.errors import FailedPrecondition

ENVIRONMENT: Mapping[str, str] = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "BLIS_NUM_THREADS": "1",
    "VECLIB_MAXIMUM_THREADS": "1",
}
"""Variables that must be set before NumPy is imported, for one BLAS thread from the start."""

CUBLAS_ENVIRONMENT: Mapping[str, str] = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
"""On a GPU the order of sums follows the workspace of cuBLAS. It must be set before a process first
computes there, and be the same on all workers, whatever their own environment says."""


def pin_one_thread(environ: MutableMapping[str, str]) -> None:
    """Write `ENVIRONMENT` into an environment, over what is there."""
    environ.update(ENVIRONMENT)


def require_one_thread() -> None:
    """Raise FailedPrecondition where a loaded BLAS would use more than one thread."""
    many = [library for library in _libraries(ThreadpoolController()) if _threads(library) > 1]
    if many:
        raise FailedPrecondition(
            f"{_name(many[0])} uses {_threads(many[0])} threads, so results are not reproducible; "
            f"set {', '.join(f'{name}={value}' for name, value in ENVIRONMENT.items())} before "
            "NumPy is imported",
            reason="BLAS_THREADS",
        )


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Limit every BLAS that is loaded to one thread, process-wide, while the body runs.

    Raises FailedPrecondition for a BLAS whose limit cannot be trusted. OpenBLAS on plain threads is
    known to give the same bits as with the variables above; with OpenMP the team of threads is
    sized again by the OpenMP runtime, whatever BLAS was told.
    """
    controller = ThreadpoolController().select(user_api="blas")
    for library in _libraries(controller):
        layer = library.get("threading_layer")
        if _threads(library) > 1 and layer != "pthreads":
            raise FailedPrecondition(
                f"{_name(library)} was built with {layer or 'unknown'} threads, which cannot be "
                "limited for certain while the program runs; set OPENBLAS_NUM_THREADS=1 and "
                "OMP_NUM_THREADS=1 before Python starts",
                reason="BLAS_THREADS",
            )
    with controller.limit(limits=1):
        yield


def _libraries(controller: ThreadpoolController) -> list[dict[str, Any]]:
    return [library for library in controller.info() if library["user_api"] == "blas"]


def _threads(library: Mapping[str, Any]) -> int:
    # Some builds do not tell; those are not counted as many.
    return int(library["num_threads"] or 1)


def _name(library: Mapping[str, Any]) -> str:
    return f"{library['internal_api']} {library['version'] or ''}".strip()
