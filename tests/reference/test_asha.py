"""What the order of promotions costs: sweeps on a clock of their own, and ASHA as it is told."""

from __future__ import annotations

import heapq
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import mean

import pytest
from google.protobuf.json_format import ParseDict

from coordinator.aggregation.core.dispatch.dispatcher import Dispatcher
from coordinator.aggregation.core.dispatch.events import (
    Append,
    Appended,
    Effect,
    Finished,
    Reported,
    Send,
    WorkerOpened,
)
from phalanx.sweeps.promotion import places_of
from phalanx.sweeps.steps import TRIAL
from phalanx.v1.job_spec_pb2 import JobSpec
from tests.unit.specs.sweep_world import FakeSweep
from tests.unit.specs.test_sweeps import dataset

COUNT, FOLDS, STEPS, REDUCTION = 54, 2, (1, 3, 9), 3
OTHER_S = 0.02
"""A task that is no trial, with the way there and back."""

SecondsOf = Callable[[int, int], float]
"""Configuration, round → what a trial takes."""


@dataclass
class Ran:
    """What a sweep took, and how many configurations each round had."""

    seconds: float = 0.0
    busy_s: float = 0.0
    entrants: list[int] = field(default_factory=lambda: [0] * len(STEPS))


@dataclass
class Curves:
    """Configurations with scores that become surer with the steps, and times that differ much."""

    seed: int

    def __post_init__(self) -> None:
        drawn = random.Random(self.seed)
        self.pace = [drawn.lognormvariate(0, 0.7) for _ in range(COUNT)]
        good = [drawn.random() for _ in range(COUNT)]
        self._scores = [
            [each + drawn.gauss(0, 0.1 / (number + 1)) for number in range(len(STEPS))]
            for each in good
        ]

    def score(self, configuration: int, number: int, _fold: int = 0) -> float:
        return self._scores[configuration][number]

    def seconds(self, configuration: int, number: int) -> float:
        return STEPS[number] * self.pace[configuration]


def swept(curves: Curves, stopping: str, workers: int, *, goes_on: bool = True) -> Ran:
    """Run a sweep on the dispatcher, its workers on a clock that only they move; each trial goes
    on from where its round before ended, or begins anew."""
    train = {"model": {"softmax_regression": {}}, "stop": {"steps": STEPS[-1]}}
    document = {
        "name": "search",
        "data": {"name": "data"},
        "sweep": {
            "base": {"train": train},
            "grid": {"train.l2": [number / 100 for number in range(COUNT)]},
            "folds": FOLDS,
            stopping: {"min_steps": STEPS[0], "reduction": REDUCTION},
        },
        "seed": curves.seed,
    }
    sweep = FakeSweep(ParseDict(document, JobSpec()), dataset(), curves.score)
    return _Clock(sweep, curves, workers, goes_on).run()


class _Clock:
    """Workers of one slot each, whose tasks end in order of time."""

    def __init__(self, sweep: FakeSweep, curves: Curves, workers: int, goes_on: bool) -> None:
        self._sweep, self._curves, self._goes_on = sweep, curves, goes_on
        self._dispatcher = Dispatcher(sweep.graph.count, 1, 3, 0, sweep.graph)
        self._dispatcher.begin()
        self._ends: list[tuple[float, int, int, int, list[str]]] = []
        self._free_s = dict.fromkeys(range(1, workers + 1), 0.0)
        self._ran = Ran()

    def run(self) -> Ran:
        effects: list[Effect] = []
        for worker in self._free_s:
            effects += self._do(self._dispatcher.handle(WorkerOpened(worker, f"w{worker}", 1), 0.0))
        while self._ends:
            self._ran.seconds, attempt, worker, task, digests = heapq.heappop(self._ends)
            seconds = self._seconds(task, digests)
            report = self._sweep.report_of(task, attempt, seconds, digests)
            if not self._goes_on:
                report.ClearField("kept")
            reported = Reported(worker, [report])
            effects = self._do(self._dispatcher.handle(reported, self._ran.seconds))
        assert any(isinstance(each, Finished) for each in effects)
        return self._ran

    def _do(self, effects: list[Effect]) -> list[Effect]:
        done = list(effects)
        for effect in effects:
            if isinstance(effect, Send):
                self._begin(effect)
            elif isinstance(effect, Append):
                done += self._do(self._dispatcher.handle(Appended(), self._ran.seconds))
        return done

    def _begin(self, send: Send) -> None:
        for place, task in enumerate(send.tasks):
            digests = [each.digest for each in send.inputs[place]]
            seconds, step = self._seconds(task, digests), self._sweep.steps[task]
            if step.kind == TRIAL:
                self._ran.busy_s += seconds
                self._ran.entrants[step.round] += step.fold == 0
            end_s = max(self._ran.seconds, self._free_s[send.session]) + seconds
            self._free_s[send.session] = end_s
            heapq.heappush(
                self._ends, (end_s, send.first_attempt + place, send.session, task, digests)
            )

    def _seconds(self, task: int, digests: list[str]) -> float:
        step = self._sweep.steps[task]
        if step.kind != TRIAL:
            return OTHER_S
        asha = self._sweep.spec.sweep.HasField("asha")
        if step.round:
            order = json.loads(self._sweep.content(digests[0]))["order"]
            configuration = order[0 if asha else step.place]
        else:
            places = places_of(self._curves.seed, COUNT) if asha else range(COUNT)
            configuration = places[step.place]
        seconds = self._curves.seconds(configuration, step.round)
        if len(digests) > 1:
            seconds -= self._curves.seconds(configuration, step.round - 1)
        return seconds


def as_it_is_told(curves: Curves, workers: int) -> Ran:
    """Algorithm 2 of the paper: whoever is free promotes by the results that are there, from the
    highest rung, or begins the next configuration. Those that are promoted go on."""

    def seconds_of(configuration: int, number: int) -> float:
        before = curves.seconds(configuration, number - 1) if number else 0.0
        return curves.seconds(configuration, number) - before

    ran, last = Ran(), len(STEPS) - 1
    results: list[list[int]] = [[] for _ in STEPS]
    promoted: list[set[int]] = [set() for _ in STEPS]
    fresh = places_of(curves.seed, COUNT)
    open_folds: list[tuple[int, int]] = []
    folds_left: dict[tuple[int, int], int] = {}
    ends: list[tuple[float, int, tuple[int, int]]] = []

    def next_trial() -> tuple[int, int] | None:
        for number in reversed(range(last)):
            ranked = sorted(results[number], key=lambda each: (-curves.score(each, number), each))
            for each in ranked[: len(ranked) // REDUCTION]:
                if each not in promoted[number]:
                    promoted[number].add(each)
                    return each, number + 1
        return (fresh.pop(0), 0) if fresh else None

    free = list(range(workers))
    while True:
        while free:
            if not open_folds:
                trial = next_trial()
                if trial is None:
                    break
                open_folds, folds_left[trial] = [trial] * FOLDS, FOLDS
                ran.entrants[trial[1]] += 1
            trial = open_folds.pop()
            ran.busy_s += seconds_of(*trial)
            heapq.heappush(ends, (ran.seconds + seconds_of(*trial), free.pop(), trial))
        if not ends:
            return ran
        ran.seconds, worker, trial = heapq.heappop(ends)
        free.append(worker)
        folds_left[trial] -= 1
        if not folds_left[trial]:
            results[trial[1]].append(trial[0])


@pytest.mark.soak
@pytest.mark.parametrize("workers", [8, 27])
def test_what_the_order_costs(workers: int) -> None:
    names = ("halving", "halving, anew", "asha", "asha, anew", "as it is told")
    found: dict[str, list[Ran]] = {name: [] for name in names}
    for seed in range(12):
        curves = Curves(seed)
        for name in ("halving", "asha"):
            found[name].append(swept(curves, name, workers))
            found[f"{name}, anew"].append(swept(curves, name, workers, goes_on=False))
        found["as it is told"].append(as_it_is_told(curves, workers))
    seconds, busy = {}, {}
    for name, some in found.items():
        seconds[name] = mean(each.seconds for each in some)
        busy[name] = mean(each.busy_s / each.seconds / workers for each in some)
        entrants = [round(mean(x), 1) for x in zip(*(each.entrants for each in some), strict=True)]
        print(f"{workers} workers, {name}: {seconds[name]:.1f} s, {busy[name]:.0%}, {entrants}")
    assert seconds["asha"] <= 1.25 * seconds["as it is told"]
    assert busy["asha"] >= busy["halving"] + 0.05
    for name in ("halving", "asha"):
        anew = sum(each.busy_s for each in found[f"{name}, anew"])
        # In rounds of 1, 3 and 9 steps 54, 18 and 6 trials take 54, 36 and 36 of 54, 54 and 54.
        assert sum(each.busy_s for each in found[name]) < 0.85 * anew
        assert seconds[name] < seconds[f"{name}, anew"]
