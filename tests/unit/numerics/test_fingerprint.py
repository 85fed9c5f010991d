"""Equal machines have equal fingerprints, others have not."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from phalanx import blas, numeric_fingerprint, rules

REPOSITORY = Path(__file__).resolve().parents[3]
CODE = "from phalanx.numeric_fingerprint import compute; print(compute())"


def in_new_process(**environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name not in blas.ENVIRONMENT}
    return subprocess.run(
        [sys.executable, "-c", CODE],
        env={**inherited, "PYTHONPATH": str(REPOSITORY), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def usual() -> str:
    done = in_new_process(**blas.ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_processes_on_one_machine_agree(usual: str) -> None:
    assert len(usual) == 64
    assert in_new_process(**blas.ENVIRONMENT).stdout.strip() == usual
    numeric_fingerprint.compute.cache_clear()
    with blas.one_blas_thread():
        assert numeric_fingerprint.compute() == usual


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names kernels of x86_64")
@pytest.mark.parametrize(
    "environment",
    [{"OPENBLAS_CORETYPE": "Nehalem"}, {"NPY_DISABLE_CPU_FEATURES": "X86_V3"}],
    ids=["OpenBLAS kernels", "NumPy kernels"],
)
def test_other_kernels_have_another_fingerprint(usual: str, environment: dict[str, str]) -> None:
    done = in_new_process(**blas.ENVIRONMENT, **environment)
    if done.returncode != 0 or "not supported" in done.stderr:
        pytest.skip(f"this NumPy does not know {environment}: {done.stderr[-200:]}")
    assert done.stdout.strip() != usual


def test_other_library_versions_have_another_fingerprint(
    usual: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numeric_fingerprint, "version", lambda library: "0.0.1")
    numeric_fingerprint.compute.cache_clear()
    try:
        with blas.one_blas_thread():
            assert numeric_fingerprint.compute() != usual
    finally:
        numeric_fingerprint.compute.cache_clear()


def test_other_rules_of_training_have_another_fingerprint(
    usual: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Members of a release that trains otherwise do not take part in a job that has begun."""
    monkeypatch.setattr(numeric_fingerprint, "RULES", rules.RULES + 1)
    numeric_fingerprint.compute.cache_clear()
    try:
        with blas.one_blas_thread():
            assert numeric_fingerprint.compute() != usual
    finally:
        numeric_fingerprint.compute.cache_clear()


def test_another_release_with_the_same_rules_has_the_same_fingerprint(
    usual: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = numeric_fingerprint.version
    monkeypatch.setattr(
        numeric_fingerprint,
        "version",
        lambda library: "9.9.9" if library == "phalanx" else known(library),
    )
    numeric_fingerprint.compute.cache_clear()
    try:
        with blas.one_blas_thread():
            assert numeric_fingerprint.compute() == usual
    finally:
        numeric_fingerprint.compute.cache_clear()


@pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="on one core BLAS never uses two threads"
)
def test_several_blas_threads_are_refused() -> None:
    done = in_new_process(OPENBLAS_NUM_THREADS="2")
    assert done.returncode != 0
    assert "results are not reproducible" in done.stderr
