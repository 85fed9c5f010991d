"""Operators see how full the disk of storage is."""

import asyncio
import math
from pathlib import Path

from prometheus_client import CollectorRegistry

from phalanx.telemetry.metrics import StorageMetrics
from storage.service import disk
from storage.service.operations import Operations


async def looked(state: Path, registry: CollectorRegistry) -> tuple[float, float]:
    """Size and free bytes as the metrics show them after the first look."""
    metrics = StorageMetrics(registry)
    operations = Operations("embedded", metrics)
    watching = asyncio.create_task(disk.show_disk(state, operations, metrics))
    try:
        done = {"operation": "disk_usage", "backend": "embedded", "outcome": "ok"}
        while not registry.get_sample_value("phalanx_storage_operation_seconds_count", done):
            await asyncio.sleep(0)
        await asyncio.sleep(0)
    finally:
        watching.cancel()
        operations.close()
    size = registry.get_sample_value("phalanx_storage_disk_size_bytes")
    free = registry.get_sample_value("phalanx_storage_disk_free_bytes")
    assert size is not None
    assert free is not None
    return size, free


async def test_size_and_free_room_are_those_of_the_disk(tmp_path: Path) -> None:
    size, free = await looked(tmp_path, CollectorRegistry())
    assert size >= free > 0


async def test_a_disk_that_is_gone_is_not_shown_as_full(tmp_path: Path) -> None:
    size, free = await looked(tmp_path / "gone", CollectorRegistry())
    assert math.isnan(size)
    assert math.isnan(free)


async def test_where_nothing_is_on_a_disk_none_is_shown_as_full(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    metrics = StorageMetrics(registry)
    operations = Operations("postgres+s3", metrics)
    try:
        await disk.show_disk(None, operations, metrics)
    finally:
        operations.close()
    for name in ("size", "free"):
        value = registry.get_sample_value(f"phalanx_storage_disk_{name}_bytes")
        assert value is not None
        assert math.isnan(value)
