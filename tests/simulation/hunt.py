"""Hunts planted bugs: how many seeds each takes to be found.

python -m tests.simulation.hunt [--seeds 2000] [--json FILE] [NAME …]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.simulation.cluster import services
from tests.simulation.mutants import MUTANTS, Mutant, planted
from tests.simulation.runs import simulate

SEEDS_MAX = 2000


def hunt(mutant: Mutant, seeds: range) -> tuple[int, str] | None:
    """The first seed that finds a bug, and how; None: none of them does."""
    with services() as given, planted(mutant):
        for seed in seeds:
            outcome = simulate(given, seed)
            if outcome.failure:
                return seed, outcome.failure
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Hunt all or some; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.hunt", description=__doc__)
    parser.add_argument("names", nargs="*", help="which (parts of names); else all")
    parser.add_argument("--seeds", type=int, default=SEEDS_MAX, help="seeds to try for each")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--json", type=Path, help="file for the result")
    given = parser.parse_args(argv)
    found = []
    for mutant in MUTANTS:
        if given.names and not any(name in mutant.name for name in given.names):
            continue
        met = hunt(mutant, range(given.first, given.first + given.seeds))
        seed, how = met if met is not None else (-1, "NOT FOUND")
        tried = seed - given.first + 1 if met is not None else given.seeds
        print(f"{tried:5} seeds  {mutant.name}: {how[:160]}", flush=True)
        found.append(
            {"name": mutant.name, "rule": mutant.rule, "seeds": tried, "found": met is not None,
             "seed": seed, "how": how}
        )  # fmt: skip
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if all(each["found"] for each in found) else 1


if __name__ == "__main__":
    sys.exit(main())
