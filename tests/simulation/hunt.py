"""Hunts planted bugs: how many seeds each takes to be found.

python -m tests.simulation.hunt [--seeds 2000] [--scenarios] [--json FILE] [NAME …]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tests.simulation.cluster import services
from tests.simulation.known import Known
from tests.simulation.mutants import MUTANTS
from tests.simulation.planting import Mutant, planted
from tests.simulation.runs import ALL_FROM_SEED

SEEDS_MAX = 2000


def hunt(mutant: Mutant, seeds: range, *, scenario: bool = False) -> tuple[int, str] | None:
    """The first seed that finds a bug, and how; None: none of them does.

    With `scenario` the seeds are those of the bug's own scenario, else of the whole swarm.
    """
    known = mutant.known if scenario and mutant.known is not None else Known(0)
    with services() as given, planted(mutant):
        for seed in seeds:
            outcome = replace(known, seed=seed).run(given)
            if outcome.failure:
                return seed, outcome.failure
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Hunt all or some; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.hunt", description=__doc__)
    parser.add_argument("names", nargs="*", help="which (parts of names); else all")
    parser.add_argument("--seeds", type=int, default=SEEDS_MAX, help="seeds to try for each")
    parser.add_argument("--first", type=int, default=ALL_FROM_SEED, help="the first seed")
    parser.add_argument(
        "--scenarios", action="store_true", help="seeds of each one's own scenario, not the swarm"
    )
    parser.add_argument("--json", type=Path, help="file for the result")
    given = parser.parse_args(argv)
    found = []
    for mutant in MUTANTS:
        if given.names and not any(name in mutant.name for name in given.names):
            continue
        met = hunt(mutant, range(given.first, given.first + given.seeds), scenario=given.scenarios)
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
