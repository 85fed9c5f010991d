"""``python -m bench.reliability [NAME …]``: what happens under faults, measured.

Prints a table, writes bench/reliability.json and the table in docs/RELIABILITY.md. Figures whose
name is not given keep their last value.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.checkout import measured_at
from bench.groups import add_names, modules
from bench.reliability.rows import Row, print_rows, read_rows, with_table
from bench.results import write_json

GROUPS = {
    "simulator": "seeds of the simulator",
    "kills": "a worker killed",
    "joins": "a worker that comes back",
    "late": "a worker stopped, hanging, cut off",
    "control": "the leading control process killed, alone and together with a worker",
    "fencing": "writes of a leader that leads no more",
    "goodput": "steps per second of 4 workers under a rain of faults, and the bits",
    "goodput_32": "the same of 32 workers, of which one dies now and then",
    "herd": "200 workers that come back at once after control was killed",
    "hostile": "memory and honest callers of servers under attack",
    "disk_errors": "EIO at every call of storage",
    "disk_full": "ENOSPC at every call of storage",
    "disk_crashes": "crash, power failure and torn write at every call of storage",
    "bit_flips": "every bit of a checkpoint flipped",
    "peers": "what other elastic trainers get wrong",
    "chaos_bits": "tests of chaos that compare the final SHA-256",
}
"""Module of this package → what it measures. Each has ``run(command, *, quick) -> list[Row]``."""

ONLY_BY_NAME = {
    "mutants": "planted bugs hunted through 2,000 seeds each, for hours",
}
"""The same, for those that are left out where no name is given."""

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    """Runs the named groups (default: all but the longest) and returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.reliability", description=__doc__)
    known = GROUPS | ONLY_BY_NAME
    add_names(parser, known)
    parser.add_argument("--quick", action="store_true", help="fewer trials; the rows say so")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "reliability.json")
    parser.add_argument("--document", type=Path, default=ROOT / "docs" / "RELIABILITY.md")
    arguments = parser.parse_args()
    measured_at()  # Now: somebody may commit while it measures.
    measured: list[Row] = []
    for module, command in modules("bench.reliability", known, arguments.names or [*GROUPS]):
        rows = module.run(command + " --quick" * arguments.quick, quick=arguments.quick)
        # Kept at once: a later group that fails must not cost what this one has measured.
        write_json(rows, arguments.output)
        measured.extend(rows)
    document = arguments.document.read_text(encoding="utf-8")
    arguments.document.write_text(
        with_table(document, read_rows(arguments.output)), encoding="utf-8"
    )
    print_rows(measured)
    print(f"written: {arguments.output} and {arguments.document}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
