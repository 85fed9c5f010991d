"""Benchmarks behind every figure in the documentation; run with ``make bench``."""
