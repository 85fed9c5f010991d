"""Data sets to resolve specs against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from phalanx.v1.dataset_service_pb2 import Dataset


@pytest.fixture
def make_dataset() -> Callable[..., Dataset]:
    """Return a function that makes a data set like Fashion-MNIST; keywords replace fields."""

    def make(**changes: Any) -> Dataset:
        fields: dict[str, Any] = {
            "namespace": "default",
            "name": "fashion",
            "version": 3,
            "manifest_digest": "ab" * 32,
            "rows": {"train": 10_000, "test": 2_000},
            "features": 784,
            "task": "classification",
            "classes": [str(each) for each in range(10)],
            "format": "dense",
            "size_bytes": 12_000 * 784 * 4,
            "target": "label",
        }
        return Dataset(**{**fields, **changes})

    return make
