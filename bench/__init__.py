"""Benchmarks behind every figure in the documentation; run with ``make bench``."""

# Before any module of this package imports gRPC, which reads its settings only once: its own lines
# would stand in the middle of the tables.
import phalanx.rpc as _rpc  # noqa: F401
