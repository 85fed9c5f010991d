"""The root's go records: their order, what is due when, and equality after a restore."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.training.decisions import RootDecider
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import GoRecord, JobPlan

Action = GoRecord.Action
ROWS = 100


def make_plan(evaluates: bool = True, total_steps: int = 0, **train: Any) -> JobPlan:
    spec = JobSpec(train=train)
    if evaluates and not spec.train.evaluation.split:
        spec.train.evaluation.split = "test"
    return JobPlan(
        job_id="j",
        spec=spec.SerializeToString(),
        shards=4,
        train_rows=ROWS,
        rows_per_leaf=5,
        steps_per_epoch=5,
        total_steps=total_steps or spec.train.stop.steps,
        evaluation_shards=2 if evaluates else 0,
        evaluation_rows=20,
        evaluation_sums=["loss", "correct"],
    )


def loss_at(version: int) -> float:
    return 10.0 / version


class Cluster:
    """Carries out records with made-up results: a pure function of the version."""

    def __init__(self, decider: RootDecider, elapsed_s: Callable[[int], float] = float) -> None:
        self.decider = decider
        self.elapsed_s = elapsed_s
        self.records: list[GoRecord] = []

    def carry_out(self, go: GoRecord) -> GoRecord:
        self.records.append(go)
        elapsed_s = self.elapsed_s(go.version)
        if go.action == GoRecord.ACTION_INITIALISE:
            return self.decider.initialised(elapsed_s)
        if go.action == GoRecord.ACTION_EVALUATE:
            correct = min(20, go.version)
            return self.decider.evaluated([loss_at(go.version + 1), correct], 20, elapsed_s)
        version = go.version + 1
        elapsed_s = self.elapsed_s(version)
        return self.decider.committed(version, 20, 20 * loss_at(version), elapsed_s)

    def run(self, go: GoRecord, limit: int = 200) -> list[GoRecord]:
        while go.action in (Action.ACTION_INITIALISE, Action.ACTION_TRAIN, Action.ACTION_EVALUATE):
            go = self.carry_out(go)
            assert len(self.records) < limit
        self.records.append(go)
        return self.records


def short(records: list[GoRecord]) -> list[str]:
    """``3.1 EVALUATE`` is the second record at version 3; a star orders a checkpoint."""
    names = [Action.Name(record.action).removeprefix("ACTION_") for record in records]
    return [
        f"{record.version}.{record.round} {name}{'*' if record.checkpoint else ''}"
        for record, name in zip(records, names, strict=True)
    ]


def run(plan: JobPlan, **options: Any) -> list[GoRecord]:
    decider = RootDecider(plan, term=3)
    return Cluster(decider, **options).run(decider.start())


def test_a_short_job_from_first_to_last_record() -> None:
    plan = make_plan(
        stop={"steps": 5}, evaluation={"every_steps": 2}, checkpoints={"every_steps": 4}
    )
    records = run(plan)
    assert short(records) == [
        "0.0 INITIALISE",
        "0.1 TRAIN",
        "1.0 TRAIN",
        "2.0 EVALUATE",
        "2.1 TRAIN",
        "3.0 TRAIN",
        "4.0 EVALUATE",
        "4.1 TRAIN*",
        "5.0 EVALUATE",
        "5.1 STOP*",
    ]
    assert records[-1].reason == "STOP_STEPS"
    assert {record.term for record in records} == {3}
    assert records[3].example_count == 20
    assert records[3].loss_sum == 20 * loss_at(2)


def test_records_are_ordered_and_no_two_are_for_the_same_round() -> None:
    records = run(make_plan(stop={"steps": 7}, evaluation={"every_steps": 1}))
    keys = [(record.version, record.round) for record in records]
    assert keys == sorted(set(keys))


def test_without_held_out_rows_nothing_is_evaluated() -> None:
    assert "EVALUATE" not in " ".join(short(run(make_plan(evaluates=False, stop={"steps": 6}))))


def test_evaluation_is_each_epoch_where_the_spec_does_not_say() -> None:
    records = run(make_plan(stop={"steps": 12}))
    evaluated = [r.version for r in records if r.action == Action.ACTION_EVALUATE]
    assert evaluated == [5, 10, 12]


def test_a_threshold_on_an_evaluation_stops_without_another_evaluation() -> None:
    rule = {"metric": "test/accuracy", "at_least": 0.2}
    plan = make_plan(stop={"steps": 50, "thresholds": [rule]}, evaluation={"every_steps": 2})
    records = run(plan)
    assert short(records)[-2:] == ["4.0 EVALUATE", "4.1 STOP*"]
    assert records[-1].reason == "STOP_THRESHOLD"


def test_a_threshold_on_the_training_loss_is_looked_at_every_step() -> None:
    rule = {"metric": "train/loss", "at_most": loss_at(7)}
    records = run(make_plan(stop={"steps": 50, "thresholds": [rule]}))
    assert short(records)[-2:] == ["7.0 EVALUATE", "7.1 STOP*"]


def test_a_plateau_counts_evaluations_also_of_the_training_loss() -> None:
    rule = {"metric": "train/loss", "evaluations": 2, "min_change": 100.0}
    records = run(make_plan(evaluates=False, stop={"plateau": rule}))
    # Epochs end at 5, 10 and 15: the second and third bring no change.
    assert short(records)[-1] == "15.0 STOP*"
    assert records[-1].reason == "STOP_PLATEAU"


def test_wall_time_stops_at_the_next_boundary_and_evaluates_first() -> None:
    plan = make_plan(stop={"wall_time": {"seconds": 3}}, evaluation={"every_steps": 100})
    assert short(run(plan))[-2:] == ["3.0 EVALUATE", "3.1 STOP*"]


def test_checkpoints_by_time() -> None:
    plan = make_plan(evaluates=False, stop={"steps": 9}, checkpoints={"every": {"seconds": 6}})
    records = run(plan, elapsed_s=lambda version: 2.5 * version)
    assert [r.version for r in records if r.checkpoint] == [3, 6, 9]


def test_a_pause_takes_effect_at_the_next_boundary_and_saves() -> None:
    plan = make_plan(stop={"steps": 50}, evaluation={"every_steps": 3})
    decider = RootDecider(plan, 1)
    cluster = Cluster(decider)
    go = cluster.carry_out(decider.start())
    go = cluster.carry_out(cluster.carry_out(go))
    decider.request_pause()
    assert short(cluster.run(go))[-2:] == ["3.0 EVALUATE", "3.1 PAUSE*"]


def test_a_job_that_is_over_stops_rather_than_pauses() -> None:
    decider = RootDecider(make_plan(stop={"steps": 1}), 1)
    cluster = Cluster(decider)
    go = cluster.carry_out(decider.start())
    decider.request_pause()
    assert cluster.run(go)[-1].action == Action.ACTION_STOP


def test_a_failure_is_sudden() -> None:
    decider = RootDecider(make_plan(stop={"steps": 50}), 1)
    last = Cluster(decider).carry_out(decider.start())
    decider.request_pause()
    sudden = decider.failed("PARAMETERS_NON_FINITE")
    assert (sudden.version, sudden.round) == (last.version, last.round + 1)
    assert (sudden.action, sudden.reason) == (Action.ACTION_FAIL, "PARAMETERS_NON_FINITE")
    assert not sudden.checkpoint


def test_a_step_without_any_example_counts_and_leaves_the_loss_unknown() -> None:
    rule = {"metric": "train/loss", "at_most": 1e9}
    decider = RootDecider(make_plan(evaluates=False, stop={"steps": 9, "thresholds": [rule]}), 1)
    decider.start()
    decider.initialised(0)
    go = decider.committed(1, 0, 0.0, 0)
    assert (go.action, go.version) == (Action.ACTION_TRAIN, 1)
    assert decider.metrics == {}
    assert decider.take_points() == []


def test_metrics_points_and_progress() -> None:
    plan = make_plan(stop={"steps": 4}, evaluation={"every_steps": 2, "metrics": ["accuracy"]})
    decider = RootDecider(plan, 1)
    cluster = Cluster(decider)
    cluster.run(decider.start())
    assert decider.metrics == {"train/loss": loss_at(4), "test/accuracy": 0.2}
    assert decider.examples == 80
    assert decider.epoch == pytest.approx(0.8)
    points = decider.take_points()
    assert (2, "test/accuracy", 0.1) in points
    assert [step for step, name, _ in points if name == "train/loss"] == [1, 2, 3, 4]
    assert decider.take_points() == []


def test_a_threshold_sees_metrics_that_are_not_shown() -> None:
    rule = {"metric": "test/loss", "at_most": loss_at(3) / 20}
    plan = make_plan(
        stop={"steps": 50, "thresholds": [rule]},
        evaluation={"every_steps": 1, "metrics": ["accuracy"]},
    )
    assert short(run(plan))[-1] == "2.1 STOP*"


def after(records: list[GoRecord], version: int) -> list[tuple[Any, ...]]:
    """What follows the last record of a version, which a checkpoint belongs to; terms aside."""
    return [
        (r.version, r.round, r.action, r.checkpoint, r.reason, r.example_count, r.loss_sum)
        for r in records
        if r.version > version
    ]


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_restored_job_takes_the_same_decisions(data: st.DataObject) -> None:
    draw = data.draw
    stop: dict[str, Any] = {"steps": draw(st.integers(1, 25))}
    if draw(st.booleans()):
        metric = draw(st.sampled_from(["train/loss", "test/loss", "test/accuracy"]))
        stop["plateau"] = {
            "metric": metric,
            "evaluations": draw(st.integers(1, 3)),
            "min_change": draw(st.sampled_from([0.0, 0.05, 0.5])),
        }
    if draw(st.booleans()):
        bound = draw(st.floats(0.3, 5))
        stop["thresholds"] = [{"metric": "train/loss", "at_most": bound}]
    checkpoints = draw(st.sampled_from([{"every_steps": 3}, {"every": {"seconds": 4}}]))
    plan = make_plan(
        draw(st.booleans()),
        stop=stop,
        evaluation={"every_steps": draw(st.integers(1, 6))},
        checkpoints=checkpoints,
    )
    decider = RootDecider(plan, 1)
    cluster = Cluster(decider)
    saved: list[tuple[int, str]] = []
    go = decider.start()
    while go.action not in (Action.ACTION_STOP, Action.ACTION_FAIL):
        if go.checkpoint:
            saved.append((go.version, decider.state()))
        go = cluster.carry_out(go)
    cluster.records.append(go)

    for version, state in saved:
        restored = RootDecider(plan, 2)
        first = restored.restore(version, json.dumps(json.loads(state)))
        assert (first.version, first.round, first.action) == (version, 0, Action.ACTION_TRAIN)
        assert not first.checkpoint
        before = next(r for r in cluster.records if r.version == version)
        assert (first.example_count, first.loss_sum) == (before.example_count, before.loss_sum)
        again = Cluster(restored, elapsed_s=lambda v, base=version: float(v - base))
        again.run(first)
        assert after(again.records, version) == after(cluster.records, version)
        assert restored.metrics == decider.metrics
        assert restored.examples == decider.examples


def test_a_restored_pause_goes_on_training() -> None:
    plan = make_plan(stop={"steps": 6}, evaluation={"every_steps": 2})
    decider = RootDecider(plan, 1)
    cluster = Cluster(decider)
    go = cluster.carry_out(decider.start())
    decider.request_pause()
    last = cluster.run(go)[-1]
    assert last.action == Action.ACTION_PAUSE
    resumed = RootDecider(plan, 2)
    first = resumed.restore(last.version, decider.state())
    assert (first.action, first.term) == (Action.ACTION_TRAIN, 2)
    rest = Cluster(resumed).run(first)
    undisturbed = run(plan)
    assert after(rest, last.version) == after(undisturbed, last.version)
