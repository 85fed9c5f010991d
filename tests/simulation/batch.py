"""Many seeds: running them, adding them up, and telling whether they prove anything."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

from tests.simulation.cluster import Services, services
from tests.simulation.jobs import BAD
from tests.simulation.outcome import Outcome
from tests.simulation.runs import KINDS, simulate

STEPS_PER_SEED = 50.0
FAULT_KINDS_PER_SEED = 5.0
_SEEDS_AT_ONCE = 5
SEEDS_FOR_EVERY_KIND = 100
"""From so many seeds on, each kind of fault must have fired somewhere."""
SEEDS_FOR_TORN_WRITES = 300
"""From so many on, power must have gone between the write of a blob and its sync."""
ERRANDS_FOR_EVERY_BAD_JOB = 100
"""From so many errands of second users on, a job with each kind of bad leaf must have ended."""
ONE_BY_ONE_SEEDS_FOR_EVERY_KIND = 75
"""The same for seeds with jobs whose contributions commit one by one."""
ALL_REDUCE_SEEDS = 100
"""From so many seeds with jobs whose workers own the parameters on, these must have met, too."""
UPDATING_SEEDS = 40
"""From so many seeds with jobs that an update makes the versions of, one of them must have been
rolled back between the two rounds of a step."""
TASK_SEEDS = 50
TASKS = {
    "tasks": "task was ever done",
    "tasks_given_up": "task ever failed as often as it may",
    "tasks_copied": "task was ever run a second time beside the first",
    "tasks_taken_over": "owner of tasks ever found results of the one before",
}
"""What must have come about in so many seeds with sets of tasks, and what is said where not."""


def run_seeds(seeds: Iterable[int]) -> list[Outcome]:
    """Run seeds one after another in this process."""
    with services() as given:
        return [simulate(given, seed) for seed in seeds]


def run_in_processes(seeds: Sequence[int], processes: int) -> Iterator[Outcome]:
    """Run seeds in so many processes of their own, in whatever order they end."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, initializer=_enter) as pool:
        yield from pool.imap_unordered(_run_seed, seeds, _SEEDS_AT_ONCE)
        pool.close()
        pool.join()


_entered = ExitStack()
_given: list[Services] = []


def _enter() -> None:
    _given.append(_entered.enter_context(services()))


def _run_seed(seed: int) -> Outcome:
    return simulate(_given[0], seed)


def replay(seed: int, tell: Callable[[str], None]) -> str:
    """Run one seed again, telling what happens; returns what must not happen and did."""
    with services() as given:
        outcome = simulate(given, seed, tell)
    tell(f"trace {outcome.trace}")
    tell(told(outcome))
    return outcome.failure


def told(outcome: Outcome) -> str:
    """One line, with the command that replays the seed where it failed."""
    if not outcome.failure:
        return f"seed {outcome.seed}: {outcome.steps} steps, {outcome.faults.total()} faults, right"
    return f"seed {outcome.seed}: {outcome.failure}\n  {command(outcome.seed)}"


def command(seed: int) -> str:
    """What replays a seed exactly."""
    return f"python -m tests.simulation --replay {seed}"


def summary(
    outcomes: Sequence[Outcome],
    processes: int,
    wall_s: float,
    timed: Sequence[Outcome] | None = None,
) -> dict[str, Any]:
    """Add outcomes up; see `__main__` for the meaning of each number.

    `timed` are those that took `wall_s`, where these are not all of them.
    """
    count = max(1, len(outcomes))
    faults: Counter[str] = Counter()
    one_by_one: Counter[str] = Counter()
    for outcome in outcomes:
        faults.update(outcome.faults)
        one_by_one.update(outcome.faults if outcome.started else {})
    jobs, equal = sum(each.jobs for each in outcomes), sum(each.sha_equal for each in outcomes)
    cancelled = sum(each.cancelled for each in outcomes)
    transitions = sum(each.transitions for each in outcomes)
    in_wall = sum(each.transitions for each in (outcomes if timed is None else timed))
    cpu_s = sum(each.cpu_s for each in outcomes)
    found: dict[str, Any] = {
        "first": min((each.seed for each in outcomes), default=0),
        "seeds": len(outcomes),
        "processes": processes,
        "wall_s": round(wall_s, 1),
        "cpu_s": round(cpu_s, 1),
        "transitions": transitions,
        "transitions_per_s": round(in_wall / max(1e-9, wall_s)),
        "transitions_per_cpu_s": round(transitions / max(1e-9, cpu_s)),
        "steps_per_seed": sum(each.steps for each in outcomes) / count,
        "virtual_s_per_seed": sum(each.virtual_s for each in outcomes) / count,
        "faults": dict(sorted(faults.items())),
        "faults_per_seed": faults.total() / count,
        "fault_kinds_per_seed": sum(len(each.faults) for each in outcomes) / count,
        "jobs": jobs,
        "sha_equal": equal,
        "cancelled": cancelled,
        "best_kept": sum(each.kept for each in outcomes),
        "sha_equal_fraction": equal / max(1, jobs - cancelled),
        "lost": sum(each.lost for each in outcomes),
        "doubled": sum(each.doubled for each in outcomes),
        "torn_writes": sum(each.torn for each in outcomes),
        "lost_writes": sum(each.unsynced for each in outcomes),
        "left_out": sum(each.left_out for each in outcomes),
        "stale_accepted": sum(each.stale_accepted for each in outcomes),
        "stale_refused": sum(each.stale_refused for each in outcomes),
        "fenced_off": sum(each.fenced_off for each in outcomes),
        "leaders_outlived": sum(each.outlived for each in outcomes),
        "copies_asked": sum(each.copies_asked for each in outcomes),
        "copies_raced": sum(each.copies_raced for each in outcomes),
        "one_by_one_seeds": sum(each.started > 0 for each in outcomes),
        "one_by_one_faults": dict(sorted(one_by_one.items())),
        "all_reduce_seeds": sum(each.reduced > 0 for each in outcomes),
        "members_caught_up": sum(each.caught_up for each in outcomes),
        "members_brought_up": sum(each.brought_up for each in outcomes),
        "leaves_started": sum(each.started for each in outcomes),
        "leaves_at_bound": sum(each.at_bound for each in outcomes),
        "contributions_repeated": sum(each.repeated for each in outcomes),
        "task_seeds": sum(each.calls > 0 for each in outcomes),
        "tasks": sum(each.tasks for each in outcomes),
        "tasks_given_up": sum(each.tasks_given_up for each in outcomes),
        "tasks_copied": sum(each.tasks_copied for each in outcomes),
        "tasks_taken_over": sum(each.tasks_taken_over for each in outcomes),
        "program_seeds": sum(each.results_read > 0 for each in outcomes),
        "results_read": sum(each.results_read for each in outcomes),
        "updating_seeds": sum(each.updated > 0 for each in outcomes),
        "cut_between_rounds": sum(each.cut_between for each in outcomes),
        "errands": sum(each.errands for each in outcomes),
        "bad_jobs": dict(sum((each.bad_jobs for each in outcomes), Counter())),
        "failures": [
            {"seed": each.seed, "failure": each.failure, "command": command(each.seed)}
            for each in outcomes
            if each.failure
        ],
    }
    found["vacuous"] = vacuous(found, faults)
    return found


def vacuous(found: dict[str, Any], faults: Counter[str]) -> list[str]:
    """Why a batch proves too little; nothing: it does not."""
    why = []
    if found["steps_per_seed"] < STEPS_PER_SEED:
        why.append(f"{found['steps_per_seed']:.1f} committed steps per seed are too few")
    if found["fault_kinds_per_seed"] < FAULT_KINDS_PER_SEED:
        why.append(f"{found['fault_kinds_per_seed']:.1f} kinds of fault per seed are too few")
    if found["seeds"] >= SEEDS_FOR_EVERY_KIND:
        missing = sorted(KINDS - faults.keys())
        if missing:
            why.append(f"these faults never happened: {', '.join(missing)}")
        if not found["copies_raced"]:
            why.append("no late shard ever came both as a copy and from its own worker")
    if found["seeds"] >= SEEDS_FOR_TORN_WRITES:
        missing = [name for name in ("torn", "lost") if not found[f"{name}_writes"]]
        why += [f"no write to storage's disk was ever {name}" for name in missing]
    missing = sorted(set(BAD) - found["bad_jobs"].keys())
    if found["errands"] >= ERRANDS_FOR_EVERY_BAD_JOB and missing:
        why.append(f"no job with such a bad leaf ended: {', '.join(missing)}")
    if found["all_reduce_seeds"] >= ALL_REDUCE_SEEDS and not found["members_caught_up"]:
        why.append("no member was ever one step behind and sent the gradient that was kept")
    if found["updating_seeds"] >= UPDATING_SEEDS and not found["cut_between_rounds"]:
        why.append("nobody was ever lost between the two rounds of a step")
    if found["task_seeds"] >= TASK_SEEDS:
        for name, what in TASKS.items():
            if not found[name]:
                why.append(f"no {what}")
    if found["one_by_one_seeds"] >= ONE_BY_ONE_SEEDS_FOR_EVERY_KIND:
        missing = sorted(KINDS - found["one_by_one_faults"].keys())
        if missing:
            why.append(f"these never happened to contributions one by one: {', '.join(missing)}")
        if not found["leaves_at_bound"]:
            why.append("no shard ever was as far ahead of the others as its bound lets it")
        if not found["contributions_repeated"]:
            why.append("no contribution ever came to a step that its shard had completed")
    return why
