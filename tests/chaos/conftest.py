"""The bits that every disturbed run is compared with."""

from typing import Any

import pytest

from phalanx.testing.arena import gated_job, undisturbed_sha256_of, unhurried_job


@pytest.fixture(scope="module", autouse=True)
def clusters_start_from(loaded_code: None) -> None:
    """Each test starts a cluster; none of them is about how that loads its code."""


@pytest.fixture(scope="session")
def undisturbed_sha256(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The bits of the job in one process, without any cluster."""
    return undisturbed_sha256_of(gated_job(), tmp_path_factory.mktemp("gate"))


@pytest.fixture(scope="session")
def long_job() -> dict[str, Any]:
    """A job that takes some seconds where a leaf takes some milliseconds."""
    return unhurried_job(steps=150)


@pytest.fixture(scope="session")
def long_sha256(tmp_path_factory: pytest.TempPathFactory, long_job: dict[str, Any]) -> str:
    """Its bits in one process, where its leaves take no time."""
    return undisturbed_sha256_of(long_job, tmp_path_factory.mktemp("gate"))
