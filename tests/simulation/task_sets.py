"""Sets of independent tasks in the simulator: what a call does, what it returns, how it goes wrong.

All of it stands in the arguments of the call, so a result can be held against them wherever it
turns up. `Calls` knows what really happened on the machines: a failure that anybody tells of must
have been one.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from phalanx.tasks import INLINE_BYTES, is_program
from phalanx.v1.job_spec_pb2 import JobSpec
from tests.simulation import programs

SHARE = 0.05
"""Part of the swarm's runs that have sets of tasks, where nothing else that is seldom is drawn."""

UNLOADABLE_SHARE = 0.15
"""Part of these in which a worker cannot load what the tasks call."""

NAMESPACE = "calls"
STRIKE, STRIKE_SHARE = "tasks_journalled aggregator kill", 0.4
"""In part of these, again and again, an owner is gone once storage has its results, and before it
has heard that."""

POISON = ("raises", "crashes", "endless", "stillborn")
"""Calls that fail wherever they run, until their job is mended."""

HARMLESS = ("large", "slow", "once", "dies once")
SLOW, LASTS_S = 6.0, 6.5
SLOWEST_S = 0.1
CONVERGES_S = 60.0
"""Time that each set may take besides: calls without an end are killed several times."""


@dataclass(frozen=True)
class TaskSet:
    """What makes one set of tasks differ from another."""

    calls: tuple[str, ...]
    """How each call goes: as any other, or one of `HARMLESS`, `POISON` or "long"."""
    attempts: int = 3
    failures_max: int | None = 0
    """Tasks that may be given up; None: any number."""
    longer: float = 1.0
    """How much longer than a leaf a call takes."""

    @property
    def timeout_s(self) -> float:
        """After which a call is killed."""
        return LASTS_S + 1.0 if "long" in self.calls else max(2.0, SLOWEST_S * self.longer * SLOW)

    @property
    def poison(self) -> frozenset[int]:
        """Tasks that fail wherever they run."""
        return frozenset(task for task, how in enumerate(self.calls) if how in POISON)


AnySet = TaskSet | programs.ProgramSet


def draw_set(chance: random.Random) -> TaskSet:
    """Draw a set of tasks."""
    calls = [""] * chance.choice([10, 20, 40])
    for how in HARMLESS:
        for _ in range(chance.choice([0, 1, 3])):
            calls[chance.randrange(len(calls))] = how
    if chance.random() < 0.1:
        calls[chance.randrange(len(calls))] = "long"
    failures_max = chance.choice([0, 0, None, 1])
    if chance.random() < 0.6:
        for _ in range(chance.choice([1, 1, 2])):
            calls[chance.randrange(len(calls))] = chance.choice(POISON)
    return TaskSet(
        tuple(calls),
        attempts=chance.choice([2, 3]),
        failures_max=failures_max,
        longer=chance.choice([0.5, 3.0, 6.0]),
    )


def drawn(settings: Any, chance: random.Random) -> Any:
    """The settings of a run of the swarm, in some of which there are sets of tasks."""
    taken = settings.parts or settings.wishes or settings.liars or settings.last
    taken = taken or settings.neighbour or settings.newcomer or settings.stranger
    taken = taken or settings.strike or settings.tasks or settings.programs
    if taken or chance.random() >= SHARE:
        return settings
    strike = STRIKE if chance.random() < STRIKE_SHARE else settings.strike
    shapes = settings.shapes[: chance.choice([0, 0, 0, 1])]
    return replace(settings, tasks=chance.choice([1, 2]), shapes=shapes, strike=strike)


def job_spec(each: AnySet, name: str, dataset: str) -> JobSpec:
    """The spec that a user would submit; programs read a data set."""
    spec = JobSpec(name=name, namespace=NAMESPACE)
    if isinstance(each, programs.ProgramSet):
        programs.write(each, dataset, spec)
        return spec
    tasks = spec.tasks
    tasks.entrypoint, tasks.attempts = "simulated:call", each.attempts
    tasks.timeout.FromMilliseconds(int(each.timeout_s * 1000))
    for number, how in enumerate(each.calls):
        tasks.arguments.add().update({"number": number, "how": how, "longer": each.longer})
    if each.failures_max is None:
        tasks.on_failure.go_on.SetInParent()
    elif each.failures_max:
        tasks.on_failure.go_on.max_tasks = each.failures_max
    else:
        tasks.on_failure.fail.SetInParent()
    return spec


def value_of(arguments: Mapping[str, Any]) -> bytes:
    """What a call returns."""
    number = int(arguments["number"])
    padding = "x" * (INLINE_BYTES + number) if arguments["how"] == "large" else ""
    return json.dumps({"number": number, "square": number * number, "padding": padding}).encode()


def arguments_of(spec: JobSpec) -> list[Mapping[str, Any]]:
    """What each task of a set, or of a program, is called with."""
    if is_program(spec):
        return programs.arguments_of(spec)
    return list(spec.tasks.arguments)


def returned(spec: JobSpec, task: int, inputs: Sequence[bytes]) -> bytes:
    """What a task returns: of a program, where it has read these results of others."""
    if is_program(spec):
        return programs.value_of(spec, task, inputs)
    return value_of(spec.tasks.arguments[task])


def values_of(spec: JobSpec) -> list[bytes]:
    """What all tasks return."""
    if is_program(spec):
        return programs.values_of(spec)
    return [value_of(each) for each in spec.tasks.arguments]


def seconds_of(arguments: Mapping[str, Any], leaf_s: float) -> float:
    """How long a call takes where a leaf takes so long."""
    if arguments["how"] == "long":
        return LASTS_S
    return leaf_s * float(arguments["longer"]) * (SLOW if arguments["how"] == "slow" else 1.0)


class Calls:
    """What really became of the calls of one run, on all machines."""

    def __init__(self) -> None:
        self.begun = 0
        self.went_on = 0
        """Calls that went on from what another has kept."""
        self.failed: Counter[tuple[str, int, str]] = Counter()
        """Calls that failed in their own process, by job, task and worker."""
        self.deleted: set[str] = set()
        self.mended: set[str] = set()
        """Jobs whose calls fail no more."""
        self.unloadable: set[str] = set()
        """Workers that cannot load the function of any job."""
        self._orphaned: set[tuple[str, int, str]] = set()
        self._once: set[tuple[str, int]] = set()

    def how(self, job_id: str, task: int, arguments: Mapping[str, Any]) -> str:
        """How a call goes that begins now: empty where it returns, else one of `POISON`."""
        how = str(arguments["how"])
        if how in POISON:
            return "" if job_id in self.mended else how
        if how in ("once", "dies once") and (job_id, task) not in self._once:
            self._once.add((job_id, task))
            return "raises" if how == "once" else "crashes"
        return ""

    def ends_with_server(self, job_id: str, task: int, worker: str) -> None:
        """A call ends with whoever starts leaf processes: the second time it is blamed for that."""
        if (job_id, task, worker) in self._orphaned:
            self.fails(job_id, task, worker)
        self._orphaned.add((job_id, task, worker))

    def fails(self, job_id: str, task: int, worker: str) -> None:
        """A call fails in its own process, or that process over it."""
        self.failed[job_id, task, worker] += 1
