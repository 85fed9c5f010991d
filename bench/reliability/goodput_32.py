"""Goodput of 32 workers on one machine, and whether the bits are the same."""

from __future__ import annotations

from bench.reliability.goodput import Scenario, measure
from bench.reliability.rows import Row

THIRTY_TWO = Scenario(
    name="goodput_32_workers",
    what="goodput, one worker `kill -9` every 29 s, 32 workers on one machine",
    workers=32,
    # Two leaves in a row on 32 workers and on 31.
    shards=62,
    leaf_s=0.2,
    every_s=29.0,
    duration_s=29.0 * 6,
    baseline_s=20.0,
    faults=("kill-worker",),
    reach_percent=98.0,
    checkpoint_every=20,
)


def run(command: str, *, quick: bool) -> list[Row]:
    """Goodput and equality of bits, 32 workers."""
    return measure(THIRTY_TWO, command, quick=quick)
