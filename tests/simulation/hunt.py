"""Hunts planted bugs: how many seeds each takes to be found.

python -m tests.simulation.hunt [--seeds 2000 [--swarm-seeds N]] [--processes N] [NAME …]

The seeds are those of the swarm, which knows nothing of the bug, and after so many of these those
of the bug's own scenario: the faults, or the settings, that bring it about more often.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from tests.simulation.cluster import services
from tests.simulation.draws import ALL_FROM_SEED
from tests.simulation.known import Known
from tests.simulation.mutants import MUTANTS
from tests.simulation.planting import Mutant, planted

SEEDS_MAX = 2000
SWARM, SCENARIO = "swarm", "scenario"


@dataclass(frozen=True)
class Hunted:
    """What came of the hunt for one bug; `seeds` are those that were tried where it was found, or
    all of them."""

    name: str
    rule: int
    found: bool
    by: str
    seeds: int
    seed: int
    how: str


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


def hunted(name: str, *, first: int, swarm_seeds: int, scenario_seeds: int) -> Hunted:
    """Hunt one bug through seeds of the swarm, and then through those of its scenario."""
    mutant = next(each for each in MUTANTS if each.name == name)
    tried = 0
    for by, count in ((SWARM, swarm_seeds), (SCENARIO, scenario_seeds)):
        met = hunt(mutant, range(first, first + count), scenario=by == SCENARIO)
        if met is not None:
            seed, how = met
            return Hunted(name, mutant.rule, True, by, seed - first + 1, seed, how)
        tried += count
    return Hunted(name, mutant.rule, False, "", tried, -1, "NOT FOUND")


def main(argv: Sequence[str] | None = None) -> int:
    """Hunt all or some; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.hunt", description=__doc__)
    parser.add_argument("names", nargs="*", help="which (parts of names); else all")
    parser.add_argument("--seeds", type=int, default=SEEDS_MAX, help="seeds to try for each")
    parser.add_argument(
        "--swarm-seeds", type=int, help="how many of them in the swarm (else all of them)"
    )
    parser.add_argument("--first", type=int, default=ALL_FROM_SEED, help="the first seed")
    parser.add_argument("--processes", type=int, default=1, help="how many hunt at a time")
    parser.add_argument("--json", type=Path, help="file for the result")
    given = parser.parse_args(argv)
    swarm_seeds = given.seeds if given.swarm_seeds is None else given.swarm_seeds
    one = partial(
        hunted,
        first=given.first,
        swarm_seeds=swarm_seeds,
        scenario_seeds=given.seeds - swarm_seeds,
    )
    names = [
        mutant.name
        for mutant in MUTANTS
        if not given.names or any(part in mutant.name for part in given.names)
    ]
    done = []
    with ProcessPoolExecutor(given.processes) as pool:
        for each in pool.map(one, names):
            print(f"{each.seeds:5} seeds  {each.by:8}  {each.name}: {each.how[:160]}", flush=True)
            done.append(each)
    if given.json is not None:
        given.json.write_text(json.dumps([asdict(each) for each in done], indent=1) + "\n")
    return 0 if all(each.found for each in done) else 1


if __name__ == "__main__":
    sys.exit(main())
