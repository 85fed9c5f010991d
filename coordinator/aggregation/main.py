"""Entry point of an aggregator process."""

from __future__ import annotations

import os
from collections.abc import Sequence

from coordinator.aggregation.config import AggregatorConfig
from phalanx.blas import pin_one_thread
from phalanx.config import parse
from phalanx.rpc.buffers import reuse_large_buffers
from phalanx.rpc.process import run_service


def main(argv: Sequence[str] | None = None) -> int:
    """Run an aggregator until it is told to stop; return its exit code."""
    config = parse(AggregatorConfig, argv, prog="phalanx aggregator")
    # Before NumPy is imported, so that its arithmetic is that of leaf processes.
    pin_one_thread(os.environ)
    reuse_large_buffers(heaps=1)
    from coordinator.aggregation.process import serve

    return run_service(config, serve, role="aggregator")
