"""Runs many seeds of the simulator, or one of them or a directed scenario again.

    python -m tests.simulation --seeds 10000 --processes 2 --json summary.json
    python -m tests.simulation --seeds 10000 --keep seeds.jsonl   # may be broken off, and goes on
    python -m tests.simulation --replay 4711                 # what happened, line by line
    python -m tests.simulation --scene found/3               # the same of a directed scenario

The summary is one JSON object:

    first, seeds, processes, wall_s        what was run, and how long that took
    cpu_s                                  processor seconds of all runs together
    transitions                            events handled by cores, see `oracle`
    transitions_per_s                      of them by wall clock, all processes together; with
                                           --keep, of the seeds that were run this time
    transitions_per_cpu_s                  of them per processor second
    steps_per_seed, virtual_s_per_seed     committed steps and virtual seconds, on average
    faults                                 how often each kind of fault fired
    faults_per_seed, fault_kinds_per_seed  faults, and different kinds of them, on average
    jobs, sha_equal, cancelled             jobs that were submitted, ended with the right SHA-256,
                                           or were cancelled by their user
    best_kept                              jobs that ended with the parameters of an evaluation
                                           before the last one, as they were to
    sha_equal_fraction                     sha_equal ÷ (jobs − cancelled)
    lost, doubled                          examples that committed steps missed or had twice
    torn_writes, lost_writes               files of storage that a crash cut off where they were
                                           not synced, and names that it took away
    left_out                               examples that finished jobs with backup shards went
                                           without, as they may
    stale_accepted, stale_refused          writes of an old generation or term that storage took,
                                           and that it refused
    fenced_off                             of these, writes of leaders that had been replaced
    leaders_outlived                       leaders that acted on although storage had given the
                                           lead to another: two at once
    copies_asked, copies_raced             copies of late shards that were asked for, and shards
                                           that came both as a copy and from their own worker
    one_by_one_seeds, one_by_one_faults    seeds with a job whose contributions commit one by one,
                                           and how often each kind of fault fired in those
    all_reduce_seeds                       seeds with jobs whose workers own the parameters
    members_caught_up, members_brought_up  members of those that were one step behind and were sent
                                           the gradient that was kept, and that were sent everything
    leaves_started, leaves_at_bound        leaves that roots started one by one, and those as far
                                           ahead of the slowest shard as they may be
    contributions_repeated                 contributions to steps that were completed already
    updating_seeds, cut_between_rounds     seeds with jobs whose versions no elementwise optimizer
                                           makes, and owners that were lost between the two rounds
                                           of a step
    program_seeds, results_read            seeds with programs, and results that their tasks read
    errands, bad_jobs                      what second users did, and their jobs with a bad leaf
                                           that ended as they must, by what was bad
    failures                               seed, what must not happen and did, command that replays
    vacuous                                why the batch proves too little; empty: it does not

The exit status is 0 if nothing failed and the batch is not vacuous.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from tests.simulation.batch import replay, run_in_processes, summary, told
from tests.simulation.cluster import services
from tests.simulation.kept import Kept
from tests.simulation.outcome import Outcome
from tests.simulation.runs import simulate
from tests.simulation.scenarios import scenarios, told_of


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.simulation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, default=100, help="how many seeds")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--processes", type=int, default=1, help="how many at once")
    parser.add_argument("--json", type=Path, help="file for the summary; else standard output")
    parser.add_argument(
        "--keep",
        type=Path,
        help="file of outcomes: what it has of the same code is not run again",
    )
    parser.add_argument("--replay", type=int, help="run this one seed and tell what happens")
    parser.add_argument("--scene", help="run this one scenario and tell what happens")
    given = parser.parse_args(argv)
    if given.scene is not None:
        return _replay_scene(parser, given.scene)
    if given.replay is not None:
        return 1 if replay(given.replay, print) else 0
    kept = Kept(given.keep) if given.keep is not None else None
    seeds = range(given.first, given.first + given.seeds)
    known = [] if kept is None else [kept.outcomes[each] for each in seeds if each in kept.outcomes]
    left = [each for each in seeds if kept is None or each not in kept.outcomes]
    started = time.perf_counter()
    fresh = _run(left, given.processes, kept)
    wall_s = time.perf_counter() - started
    found = summary([*known, *fresh], given.processes, wall_s, timed=fresh or known)
    text = json.dumps(found, indent=1)
    if given.json is None:
        print(text)
    else:
        given.json.write_text(text + "\n")
    return 1 if found["failures"] or found["vacuous"] else 0


def _replay_scene(parser: argparse.ArgumentParser, name: str) -> int:
    known = scenarios().get(name)
    if known is None:
        parser.error(f"there is no scenario {name!r}, but {', '.join(scenarios())}")
    with services() as given:
        outcome = known.run(given, print)
    print(f"trace {outcome.trace}")
    print(told_of(name, outcome))
    return 1 if outcome.failure else 0


def _run(seeds: Sequence[int], processes: int, kept: Kept | None) -> list[Outcome]:
    """Run seeds, in this process or in several; say at once where one failed."""
    outcomes = []
    with ExitStack() as stack:
        if processes == 1:
            entered = stack.enter_context(services())
            running: Iterator[Outcome] = (simulate(entered, seed) for seed in seeds)
        else:
            running = run_in_processes(seeds, processes)
        for outcome in running:
            if outcome.failure:
                print(told(outcome), file=sys.stderr, flush=True)
            if kept is not None:
                kept.add(outcome)
            outcomes.append(outcome)
    if kept is not None:
        kept.close()
    return outcomes


if __name__ == "__main__":
    sys.exit(main())
