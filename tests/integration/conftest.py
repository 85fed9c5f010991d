"""Clusters with the digits of scikit-learn, one for each module that asks for them."""

from collections.abc import Iterator

import pytest

import phalanx
from phalanx.testing.datasets import digits


@pytest.fixture(scope="module")
def local() -> Iterator[phalanx.LocalCluster]:
    with phalanx.LocalCluster(workers=2, slots=1) as cluster:
        cluster.data.add("digits", *digits())
        yield cluster


@pytest.fixture(scope="module")
def alone() -> Iterator[phalanx.Cluster]:
    with phalanx.LocalCluster(workers=0) as cluster:
        cluster.data.add("digits", *digits())
        yield cluster
