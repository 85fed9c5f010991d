"""The bits that every disturbed run is compared with."""

import os

import pytest

import phalanx
from phalanx.testing.arena import GUARD_S, add_blobs, gated_job


@pytest.fixture(scope="session")
def undisturbed_sha256(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The bits of the job in one process, without any cluster."""
    os.environ["PHALANX_TEST_GATE"] = str(tmp_path_factory.mktemp("gate"))
    with phalanx.LocalCluster(workers=0) as cluster:
        add_blobs(cluster)
        return str(cluster.submit(gated_job()).wait(timeout_s=GUARD_S).parameters_sha256)
