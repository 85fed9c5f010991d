"""Planted bugs, each hunted through the seeds of the simulator from 1,000 on.

First through some of the swarm, which knows nothing of the bug, and if they do not meet it through
those of a scenario that brings it about. Takes half an hour, so it is done only when asked for.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.reliability.rows import Row, Rows

ROOT = Path(__file__).resolve().parents[2]
SEEDS, QUICK_SEEDS = 2_000, 3
SWARM_SEEDS = 60
PROCESSES = 2
PLANTED_LEAST = 20


def run(command: str, *, quick: bool) -> list[Row]:
    """Hunt all of them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        seeds, swarm = (QUICK_SEEDS, 1) if quick else (SEEDS, SWARM_SEEDS)
        options = ["--seeds", seeds, "--swarm-seeds", swarm, "--processes", PROCESSES]
        # Exit code 1 says that one was not found; the file says which.
        subprocess.run(
            [
                *(sys.executable, "-m", "tests.simulation.hunt", "--json", str(path)),
                *map(str, options),
            ],
            cwd=ROOT,
            check=False,
        )
        found = json.loads(path.read_text())
    return [row_of(found, command, quick=quick)]


def row_of(hunted: list[dict[str, Any]], command: str, *, quick: bool) -> Row:
    """The figure of what ``python -m tests.simulation.hunt --json`` wrote."""
    swarm = [each["seeds"] for each in hunted if each["by"] == "swarm"]
    scenario = [each["seeds"] for each in hunted if each["by"] == "scenario"]
    missed = [each["name"] for each in hunted if not each["found"]]
    note = f"{len(swarm)} by one of {SWARM_SEEDS} seeds of the swarm, {swarm.count(1)} of them by "
    note += f"the first; {len(scenario)} by seeds of a scenario that brings them about, "
    note += f"the last after {max(scenario, default=0):,}"
    if missed:
        note += f"; not found: {', '.join(missed)}"
    return Rows(command, quick).all_of(
        "planted_bugs_found",
        f"planted bugs that the simulator finds, within {SEEDS:,} seeds each",
        len(swarm) + len(scenario),
        "bugs",
        trials=max(len(hunted), PLANTED_LEAST),
        note=note,
    )
