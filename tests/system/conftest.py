"""What all tests of whole clusters share."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def clusters_start_from(loaded_code: None) -> None:
    """Each test starts a cluster; none of them is about how that loads its code."""
