"""``python -m bench [NAME …]``: runs the benchmarks, prints a table, writes results.json."""

from __future__ import annotations

import argparse
import importlib
import time
from pathlib import Path

from bench.results import Measurement, print_table, write_json

SUITES = {
    "startup": "up_ready_s, import_s, control_idle_mb",
    "small_model": "small_model_steps_per_s",
    "exchange": "exchange_100mb_vs_grpc_echo, …_vs_gloo, aggregator_memory_ratio_…",
    "efficiency": "worker_efficiency_1, scaling_2_workers, checkpoint_overhead",
    "recovery": "kill_to_commit_s",
}


def main() -> int:
    """Runs the named suites (default: all) and returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="NAME", help=", ".join(SUITES))
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results.json"))
    arguments = parser.parse_args()
    unknown = set(arguments.suites) - set(SUITES)
    if unknown:
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}; have {', '.join(SUITES)}")
    measurements: list[Measurement] = []
    for suite in arguments.suites or SUITES:
        print(f"… {suite}: {SUITES[suite]}", flush=True)
        start = time.monotonic()
        module = importlib.import_module(f"bench.{suite}")
        measurements.extend(module.run(f"python -m bench {suite}"))
        print(f"  {time.monotonic() - start:.0f} s", flush=True)
    print_table(measurements)
    write_json(measurements, arguments.output)
    print(f"written: {arguments.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
