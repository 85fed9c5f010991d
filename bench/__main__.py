"""``python -m bench [NAME …]``: runs the benchmarks, prints a table, writes results.json."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.groups import add_names, modules
from bench.results import Measurement, print_table, write_json

SUITES = {
    "startup": "up_ready_s, import_s, control_idle_mb",
    "small_model": "small_model_steps_per_s",
    "exchange": "exchange_100mb_vs_grpc_echo, …_vs_gloo, aggregator_memory_ratio_…",
    "efficiency": "worker_efficiency_1, scaling_2_workers and its bound, checkpoint_overhead",
    "heterogeneous": "heterogeneous_slow, heterogeneous_straggler, heterogeneous_join",
    "tasks": "tasks_per_s, task_round_trip_ms",
    "all_reduce": "all_reduce_sent_1 … all_reduce_sent_8",
    "recovery": "kill_to_commit_s, kill_to_commit_large_data_s",
    "states": "states_again_8_steps_s, states_again_32_steps_s",
}


def main() -> int:
    """Runs the named suites (default: all) and returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    add_names(parser, SUITES)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results.json"))
    arguments = parser.parse_args()
    measurements: list[Measurement] = []
    for module, command in modules("bench", SUITES, arguments.names):
        measurements.extend(module.run(command))
        # Kept at once: a later suite that fails must not cost what this one has measured.
        write_json(measurements, arguments.output)
    print_table(measurements)
    print(f"written: {arguments.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
