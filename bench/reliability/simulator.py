"""Seeds of the simulator, run by its own command, and its summary as rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.reliability.rows import Row

SEEDS, QUICK_SEEDS = 10_000, 40
ROOT = Path(__file__).resolve().parents[2]


def run(command: str, *, quick: bool) -> list[Row]:
    """All figures of one batch of seeds."""
    seeds = QUICK_SEEDS if quick else SEEDS
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "summary.json"
        arguments = ["--seeds", str(seeds), "--processes", str(os.cpu_count() or 1)]
        # Exit code 1 says that a seed failed; the summary says which, and becomes a row.
        subprocess.run(
            [sys.executable, "-m", "tests.simulation", *arguments, "--json", str(path)],
            cwd=ROOT,
            check=False,
        )
        found = json.loads(path.read_text())
    return rows_of(found, command, quick=quick)


def rows_of(found: dict[str, Any], command: str, *, quick: bool) -> list[Row]:
    """The rows of a summary of ``python -m tests.simulation``."""
    seeds = found["seeds"]
    failed = "; ".join(each["command"] for each in found["failures"][:3])
    weak = "; ".join(found["vacuous"])

    def row(name: str, what: str, value: float, unit: str, reach: str, reached: bool) -> Row:
        return Row(
            f"simulator_{name}", what, value, unit, reach, reached, seeds, command, "", quick
        )

    def at_least(name: str, what: str, value: float, unit: str, bound: float) -> Row:
        return row(name, what, value, unit, f">= {bound:,g}", value >= bound)

    def none(name: str, what: str, value: float) -> Row:
        return row(name, what, value, "", "0", value == 0)

    return [
        Row(
            "simulator_seeds_failed",
            "seeds in which something happened that must not, or that proved too little",
            len(found["failures"]) + len(found["vacuous"]),
            "",
            "0",
            not found["failures"] and not found["vacuous"],
            seeds,
            command,
            "; ".join(part for part in (failed, weak) if part),
            quick,
        ),
        at_least(
            "transitions_per_s",
            f"core transitions per second by {found['processes']} processes, invariants on",
            found["transitions_per_s"],
            "1/s",
            20_000,
        ),
        at_least("steps_per_seed", "committed steps per seed", found["steps_per_seed"], "", 50),
        at_least(
            "fault_kinds_per_seed",
            f"kinds of fault per seed ({found['faults_per_seed']:.1f} faults of all kinds)",
            found["fault_kinds_per_seed"],
            "",
            5,
        ),
        none("examples_lost", "examples that committed steps missed", found["lost"]),
        none("examples_doubled", "examples that committed steps had twice", found["doubled"]),
        row(
            "sha_equal",
            f"jobs with the SHA-256 of the plain loop, of {found['jobs'] - found['cancelled']:,}",
            100 * found["sha_equal_fraction"],
            "%",
            "100",
            found["sha_equal"] == found["jobs"] - found["cancelled"],
        ),
        none(
            "stale_writes_accepted",
            f"stale-generation and stale-term writes accepted; {found['stale_refused']:,} refused",
            found["stale_accepted"],
        ),
    ]
