"""Planted bugs, each hunted through seeds of the simulator.

First through the swarm, which has met most of them after some seeds; what it has not met by then is
hunted through the seeds of the bug's own scenario, a directed one where the bug needs rare things
to meet.
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
SWARM_SEEDS = 20
PLANTED_LEAST = 20


def run(command: str, *, quick: bool) -> list[Row]:
    """Hunt all of them."""
    seeds = QUICK_SEEDS if quick else SWARM_SEEDS
    in_swarm = _hunt("--seeds", str(seeds))
    missed = [each["name"] for each in in_swarm if not each["found"]]
    left = QUICK_SEEDS if quick else SEEDS - SWARM_SEEDS
    directed = _hunt("--scenarios", "--first", "0", "--seeds", str(left), *missed) if missed else []
    return [row_of(in_swarm, directed, command, quick=quick)]


def _hunt(*arguments: str) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        # Exit code 1 says that one was not found; the file says which.
        subprocess.run(
            [sys.executable, "-m", "tests.simulation.hunt", *arguments, "--json", str(path)],
            cwd=ROOT,
            check=False,
        )
        found: list[dict[str, Any]] = json.loads(path.read_text())
    return found


def row_of(
    in_swarm: list[dict[str, Any]], directed: list[dict[str, Any]], command: str, *, quick: bool
) -> Row:
    """The figure of what ``python -m tests.simulation.hunt --json`` wrote, of the swarm and of the
    scenarios of those that it had not met."""
    met = {each["name"]: each["seeds"] for each in in_swarm if each["found"]}
    swarm = len(met)
    tried = {each["name"]: each["seeds"] for each in in_swarm}
    met |= {each["name"]: tried[each["name"]] + each["seeds"] for each in directed if each["found"]}
    missed = sorted(tried.keys() - met.keys())
    note = f"{swarm} of them by the swarm within {SWARM_SEEDS} seeds, the others by a scenario of "
    note += f"their own; the last after {max(met.values(), default=0):,} seeds in all"
    if missed:
        note += f"; not found: {', '.join(missed)}"
    return Rows(command, quick).all_of(
        "planted_bugs_found",
        f"planted bugs that the simulator finds, within {SEEDS:,} seeds each",
        len(met),
        "bugs",
        trials=max(len(tried), PLANTED_LEAST),
        note=note,
    )
