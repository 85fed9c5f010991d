"""The bits that every disturbed run is compared with."""

import pytest

from phalanx.testing.arena import gated_job, undisturbed_sha256_of


@pytest.fixture(scope="session")
def undisturbed_sha256(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The bits of the job in one process, without any cluster."""
    return undisturbed_sha256_of(gated_job(), tmp_path_factory.mktemp("gate"))
