"""Planted bugs, each hunted through the seeds of the simulator from 1,000 on.

Takes hours, so it is done only when it is asked for.
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
PLANTED_LEAST = 20


def run(command: str, *, quick: bool) -> list[Row]:
    """Hunt all of them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        seeds = str(QUICK_SEEDS if quick else SEEDS)
        # Exit code 1 says that one was not found; the file says which.
        subprocess.run(
            [sys.executable, "-m", "tests.simulation.hunt", "--seeds", seeds, "--json", str(path)],
            cwd=ROOT,
            check=False,
        )
        found = json.loads(path.read_text())
    return [row_of(found, command, quick=quick)]


def row_of(hunted: list[dict[str, Any]], command: str, *, quick: bool) -> Row:
    """The figure of what ``python -m tests.simulation.hunt --json`` wrote."""
    found = [each["seeds"] for each in hunted if each["found"]]
    missed = [each["name"] for each in hunted if not each["found"]]
    note = f"at once {sum(seeds == 1 for seeds in found)}, within 20 seeds "
    note += f"{sum(seeds <= 20 for seeds in found)}, the last after {max(found, default=0):,}"
    if missed:
        note += f"; not found: {', '.join(missed)}"
    return Rows(command, quick).all_of(
        "planted_bugs_found",
        f"planted bugs that the simulator's swarm finds, within {SEEDS:,} seeds each",
        len(found),
        "bugs",
        trials=max(len(hunted), PLANTED_LEAST),
        note=note,
    )
