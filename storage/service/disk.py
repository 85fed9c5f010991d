"""How full the disk of the state folder is, for the metrics."""

import asyncio
import math
from functools import partial
from pathlib import Path
from shutil import disk_usage

from phalanx.telemetry.metrics import StorageMetrics
from storage.service.operations import Operations

SHOW_INTERVAL_S = 15.0


async def show_disk(state: Path | None, operations: Operations, metrics: StorageMetrics) -> None:
    """Keep the metrics up to date until cancelled; they are NaN where there is no state folder.

    A disk that hangs must not hold up the event loop, so a thread looks; what is shown is then old.
    """
    if state is None:
        metrics.storage_disk_size_bytes.set(math.nan)
        metrics.storage_disk_free_bytes.set(math.nan)
        return
    look = partial(_size_and_free_bytes, state)
    while True:
        size_bytes, free_bytes = await operations.blobs("disk_usage", look)
        metrics.storage_disk_size_bytes.set(size_bytes)
        metrics.storage_disk_free_bytes.set(free_bytes)
        await asyncio.sleep(SHOW_INTERVAL_S)


def _size_and_free_bytes(state: Path) -> tuple[float, float]:
    try:
        usage = disk_usage(state)
    except OSError:
        return math.nan, math.nan
    return usage.total, usage.free
