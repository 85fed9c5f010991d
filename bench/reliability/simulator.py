"""Seeds of the simulator, run by its own command, and its summary as rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.reliability.rows import Row, Rows

SEEDS, QUICK_SEEDS = 10_000, 40
STALE_WRITES = 1_000
"""Writes of leaders that had been replaced without which it is not shown that none is taken."""
ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "out" / "simulated-seeds.jsonl"


def run(command: str, *, quick: bool) -> list[Row]:
    """All figures of one batch of seeds."""
    seeds = QUICK_SEEDS if quick else SEEDS
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "summary.json"
        arguments = ["--seeds", str(seeds), "--processes", str(os.cpu_count() or 1)]
        if not quick:
            arguments += ["--keep", str(KEPT)]  # an hour of work, which may be broken off
        # Exit code 1 says that a seed failed; the summary says which, and becomes a row.
        subprocess.run(
            [sys.executable, "-m", "tests.simulation", *arguments, "--json", str(path)],
            cwd=ROOT,
            check=False,
        )
        found = json.loads(path.read_text())
    if not quick:
        KEPT.unlink(missing_ok=True)
    return rows_of(found, command, quick=quick)


def rows_of(found: dict[str, Any], command: str, *, quick: bool) -> list[Row]:
    """The rows of a summary of ``python -m tests.simulation``."""
    seeds = found["seeds"]
    failed = "; ".join(each["command"] for each in found["failures"][:3])
    weak = "; ".join(found["vacuous"])

    made = Rows(command, quick)
    compared = found["jobs"] - found["cancelled"]

    def at_least(name: str, what: str, value: float, unit: str, bound: float) -> Row:
        return made.at_least(f"simulator_{name}", what, value, unit, bound, trials=seeds, note="")

    def none(name: str, what: str, count: int, note: str = "") -> Row:
        return made.none(f"simulator_{name}", what, count, trials=seeds, note=note)

    return [
        none(
            "seeds_failed",
            "seeds in which something happened that must not, or that proved too little",
            len(found["failures"]) + len(found["vacuous"]),
            "; ".join(part for part in (failed, weak) if part),
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
        made.all_of(
            "simulator_sha_equal",
            "jobs with the SHA-256 of the plain loop",
            found["sha_equal"],
            "jobs",
            trials=compared,
        ),
        made.none(
            "stale_writes_accepted_simulated",
            "stale-generation writes accepted in the simulator",
            found["stale_accepted"],
            trials=found["fenced_off"],
            least=STALE_WRITES * seeds // SEEDS if quick else STALE_WRITES,
            note=f"{found['leaders_outlived']:,} leaders that were paused or cut off acted on "
            f"beside their successors; {found['stale_refused'] - found['fenced_off']:,} writes of "
            "stale terms were refused besides, and counted if they were not",
        ),
    ]
