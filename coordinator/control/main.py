"""The main of a control process."""

from __future__ import annotations

from collections.abc import Sequence

from coordinator.control.config import ControlConfig
from coordinator.control.process import serve
from phalanx.config import parse
from phalanx.rpc.process import run_service


def main(argv: Sequence[str] | None = None) -> int:
    """Run until told to stop; return the exit code."""
    config = parse(ControlConfig, argv, prog="phalanx coordinator")
    return run_service(config, serve, role="control")
