"""Early stopping: which trials go on is a function of their scores, whoever ends first."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from google.protobuf.json_format import ParseDict
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from coordinator.aggregation.core.dispatch.dispatcher import Dispatcher
from coordinator.aggregation.core.dispatch.events import (
    Append,
    Appended,
    Finished,
    Reported,
    Send,
    WorkerOpened,
)
from phalanx.sweeps.promotion import Rung, places_of, promotions_max
from phalanx.sweeps.ranking import Scored
from phalanx.v1.job_spec_pb2 import JobSpec
from tests.unit.specs.sweep_world import FakeSweep, ScoreOf, SweepWorld
from tests.unit.specs.test_sweeps import dataset

SCORES = st.one_of(st.none(), st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]))
FOLDS = 2


def fake(
    count: int, score_of: ScoreOf, stopping: dict[str, Any], *, metric: str = "accuracy"
) -> FakeSweep:
    document = {
        "name": "search",
        "data": {"name": "data"},
        "sweep": {
            "base": {"train": {"model": {"softmax_regression": {}}, "stop": {"steps": 9}}},
            "grid": {"train.l2": [number / 100 for number in range(count)]},
            "folds": FOLDS,
            "objective": {"metric": metric},
            **stopping,
        },
        "seed": 5,
    }
    return FakeSweep(ParseDict(document, JobSpec()), dataset(), score_of)


def promotions(
    places: Sequence[int], score_of: ScoreOf, rounds: int, reduction: float, *, more: bool
) -> list[list[int]]:
    """ASHA with one worker, as the paper has it: after each result whoever is among the best of
    the rung and was not promoted is. At its end one is, in any case."""

    def mean(configuration: int, number: int) -> float | None:
        scores = tuple(score_of(configuration, number, fold) for fold in range(FOLDS))
        return Scored(configuration, scores).mean

    entrants = [list(places)]
    for number in range(rounds - 1):
        promoted: list[int] = []
        ranked: list[int] = []
        for count in range(1, len(entrants[-1]) + 1):
            known = [each for each in entrants[-1][:count] if mean(each, number) is not None]
            ranked = sorted(
                known, key=lambda each: ((-1 if more else 1) * (mean(each, number) or 0.0), each)
            )
            promoted += [x for x in ranked[: int(count / reduction)] if x not in promoted]
        entrants.append(promoted or ranked[:1])
    return entrants


# Examples are small as they are, and each of them takes a tenth of a second: no shrinking.
@settings(max_examples=10, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(data=st.data())
def test_promotions_table_and_winner_are_those_of_the_scores_alone(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 7), "configurations")
    reduction = data.draw(st.sampled_from([1.5, 2.0, 2.5, 3.0]), "reduction")
    metric = data.draw(st.sampled_from(["accuracy", "log_loss"]), "metric")
    drawn = {
        (configuration, number, fold): data.draw(SCORES)
        for configuration in range(count)
        for number in range(6)
        for fold in range(FOLDS)
    }

    def score_of(configuration: int, number: int, fold: int) -> float | None:
        # One that can be the best, so that there is a table.
        return 0.5 if configuration == count - 1 else drawn[configuration, number, fold]

    sweep = fake(count, score_of, {"asha": {"min_steps": 1, "reduction": reduction}}, metric=metric)
    expected = sweep.in_order()
    orders = [task for task, step in enumerate(sweep.steps) if step.kind == "order"]
    found = [
        sorted(entry[0] for entry in json.loads(expected[task].content)["scores"])
        for task in orders
    ]
    rounds, more = len(sweep.rounds), metric == "accuracy"
    entrants = promotions(places_of(5, count), score_of, rounds, reduction, more=more)
    assert found == [sorted(each) for each in entrants]
    table = orders[-1] + 1
    rows = json.loads(expected[table].content)["configurations"]
    reached = {each: number for number, some in enumerate(entrants) for each in some}
    assert {row["configuration"]: row["round"] - 1 for row in rows} == reached
    for seed in range(2):
        world = SweepWorld(data.draw(st.integers(0, 10**6), f"world {seed}"), sweep)
        world.run()
        assert isinstance(world.end, Finished)
        results = {each.task: each for record in world.records() for each in record.results}
        values = {task: each.stored for task, each in results.items()}
        values |= sweep.graph.passed_over(values)
        assert [values[task].digest for task in range(len(values))] == [
            each.digest for each in expected
        ]


@settings(deadline=None)
@given(
    means=st.lists(st.one_of(st.none(), st.floats(-1, 1)), min_size=1, max_size=40),
    reduction=st.floats(1.1, 6),
    cut=st.integers(0, 40),
)
def test_what_was_promoted_stays_so_and_has_the_best_of_the_whole_rung(
    means: list[float | None], reduction: float, cut: int
) -> None:
    rung = Rung(reduction, more_is_better=True)
    early: list[tuple[int, int]] = []
    for place, mean in enumerate(means):
        rung.add(place, place, mean)
        if place < cut:
            early = list(rung.promoted)
    assert rung.promoted[: len(early)] == early
    promoted = [configuration for _, configuration in rung.promoted]
    assert len(set(promoted)) == len(promoted) <= promotions_max(len(means), reduction)
    best = sorted((-mean, number) for number, mean in enumerate(means) if mean is not None)
    assert {number for _, number in best[: int(len(means) / reduction)]} <= set(promoted)
    assert len({place for place, _ in rung.promoted}) == len(promoted)
    rung.close(len(means) - 1)
    assert bool(rung.promoted) == bool(best)
    other = Rung(reduction, more_is_better=True)
    other.take(json.loads(json.dumps(rung.to_json())))
    assert other == rung


def run_but(sweep: FakeSweep, held: set[int], slots: int = 4) -> list[int]:
    """Run whatever a worker is given but for some tasks, which do not end; return what it ran."""
    dispatcher = Dispatcher(sweep.graph.count, 1, 3, 0, sweep.graph)
    dispatcher.begin()
    ran: list[int] = []
    effects = dispatcher.handle(WorkerOpened(1, "worker-1", slots), 0.0)
    now_s = 0.0
    while effects:
        reports = []
        for send in (each for each in effects if isinstance(each, Send)):
            for attempt, task in enumerate(send.tasks, send.first_attempt):
                if task in held:
                    continue
                digests = [x.digest for x in send.inputs[attempt - send.first_attempt]]
                reports.append(sweep.report_of(task, attempt, 1.0, digests))
                ran.append(task)
        now_s += 1.0
        appends = any(isinstance(each, Append) for each in effects)
        effects = dispatcher.handle(Appended(), now_s) if appends else []
        if reports:
            effects += dispatcher.handle(Reported(1, reports), now_s)
    return ran


def falling(configuration: int, number: int, fold: int) -> float:
    return 1 - configuration / 100 + number / 1000 + fold / 10000


@pytest.mark.parametrize(("stopping", "waits"), [("asha", False), ("halving", True)])
def test_no_round_waits_for_a_straggler(stopping: str, waits: bool) -> None:
    sweep = fake(12, falling, {stopping: {"min_steps": 1}})
    rounds = len(sweep.rounds)
    last = sweep.rounds[0].count - 1
    held = {
        task
        for task, step in enumerate(sweep.steps)
        if step.kind == "trial" and step.round == 0 and step.place == last
    }
    ran = run_but(sweep, held)
    trials = [sweep.steps[task] for task in ran if sweep.steps[task].kind == "trial"]
    assert {each.round for each in trials} == ({0} if waits else set(range(rounds)))
    assert {each.place for each in trials if each.round == 0} == set(range(last))


@pytest.mark.parametrize("stopping", ["asha", "halving"])
def test_each_trial_of_a_later_round_goes_on_from_its_own_of_the_one_before(stopping: str) -> None:
    """The fake trainings fail where what they get was kept by another trial."""
    sweep = fake(12, falling, {stopping: {"min_steps": 1}})
    ran = [sweep.steps[task] for task in run_but(sweep, set())]
    later = [each for each in ran if each.kind == "trial" and each.round]
    assert len(sweep.went_on) == len(later) > 0
    assert not sweep.began_anew


@pytest.mark.parametrize(("room", "keeps"), [(0, True), (-1, False)])
def test_trials_that_would_keep_too_much_together_keep_nothing(
    monkeypatch: pytest.MonkeyPatch, room: int, keeps: bool
) -> None:
    sweep = fake(9, falling, {"halving": {"min_steps": 1}})
    trials = (9 + 3) * FOLDS
    monkeypatch.setattr("phalanx.sweeps.tasks.KEPT_BYTES_MAX", trials * len("0 0 0") + room)
    run_but(sweep, set())
    assert (bool(sweep.went_on), bool(sweep.began_anew)) == (keeps, not keeps)


def test_what_a_version_without_places_has_written_lets_trials_begin_anew() -> None:
    rung = Rung(2.0, more_is_better=True)
    for place in range(4):
        rung.add(place, 10 + place, 0.1 * place)
    document = rung.to_json()
    assert [rung.place_of(number) for number in (10, 13, 14)] == [0, 3, None]
    del document["places"]
    other = Rung(2.0, more_is_better=True)
    other.take(document)
    other.add(4, 14, 0.9)
    assert other.place_of(13) is other.place_of(14) is None
    assert other.promoted_by(4) == 14


def test_those_that_go_on_come_before_those_that_begin() -> None:
    sweep = fake(20, falling, {"asha": {"min_steps": 1}})
    trials = [sweep.steps[task] for task in run_but(sweep, set(), slots=2)]
    rounds = [each.round for each in trials if each.kind == "trial"]
    first = rounds.index(1)
    assert rounds[first:].count(0) >= 10, "trials of the first round were still to come"


def test_places_are_drawn_by_the_seed() -> None:
    assert sorted(places_of(1, 50)) == list(range(50))
    assert places_of(1, 50) == places_of(1, 50) != places_of(2, 50)


@pytest.mark.parametrize("seed", range(4))
def test_a_grid_whose_values_become_better_and_better_lets_few_go_on(seed: int) -> None:
    def promoted(places: Sequence[int]) -> int:
        rung = Rung(3.0, more_is_better=True)
        for place, configuration in enumerate(places):
            rung.add(place, configuration, configuration / 1000)
        return len(rung.promoted)

    assert promoted(range(300)) == 298, "each was among the best of those before it"
    assert 100 <= promoted(places_of(seed, 300)) <= 100 + 300**0.5
