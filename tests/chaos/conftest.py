"""The bits that every disturbed run is compared with, and what storage keeps things in."""

from collections.abc import Iterator
from typing import Any

import pytest

from phalanx.testing import stores
from phalanx.testing.arena import gated_job, undisturbed_sha256_of, unhurried_job


@pytest.fixture(scope="session")
def shared_stores(request: pytest.FixtureRequest) -> stores.SharedStores | None:
    """The servers that `--stores` asks for; None: storage is embedded."""
    if request.config.getoption("--stores") == stores.EMBEDDED:
        return None
    return stores.SharedStores(
        request.getfixturevalue("postgres_server"), request.getfixturevalue("object_server")
    )


@pytest.fixture(scope="module", autouse=True)
def clusters_keep_things(shared_stores: stores.SharedStores | None) -> Iterator[None]:
    """Storages of this folder's tests are where `--stores` says."""
    with stores.used(shared_stores):
        yield


@pytest.fixture(scope="module")
def embedded_only(shared_stores: stores.SharedStores | None) -> None:
    """For tests about the disk under embedded storage."""
    if shared_stores is not None:
        pytest.skip("about the disk that embedded storage is on")


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
