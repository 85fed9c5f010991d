"""Stop rules: the first that holds wins, and they survive a restore."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phalanx.training.stop import StopRules
from phalanx.v1.job_spec_pb2 import Stop, Train


def rules(total_steps: int = 0, **stop: Any) -> StopRules:
    return StopRules(Train(stop=stop), total_steps)


def test_steps_and_epochs() -> None:
    by_steps = rules(10, steps=10)
    by_steps.observe(9, {})
    assert by_steps.reason == ""
    by_steps.observe(10, {})
    assert by_steps.reason == "STOP_STEPS"
    by_epochs = rules(6, epochs=2.0, steps=10)
    by_epochs.observe(6, {})
    assert by_epochs.reason == "STOP_EPOCHS"


@pytest.mark.parametrize(
    ("bound", "value", "stops"),
    [
        ({"at_least": 0.86}, 0.86, True),
        ({"at_least": 0.86}, 0.859, False),
        ({"at_most": 0.1}, 0.1, True),
        ({"at_most": 0.1}, 0.11, False),
        ({"at_least": 0.86}, float("nan"), False),
        ({"at_most": 0.1}, float("nan"), False),
    ],
)
def test_thresholds(bound: dict[str, float], value: float, stops: bool) -> None:
    each = rules(thresholds=[{"metric": "test/accuracy", **bound}])
    each.observe(1, {"test/loss": value})
    assert each.reason == ""
    each.observe(1, {"test/accuracy": value})
    assert each.reason == ("STOP_THRESHOLD" if stops else "")


def test_the_first_rule_that_holds_keeps_the_reason() -> None:
    both = rules(5, steps=5, thresholds=[{"metric": "train/loss", "at_most": 1.0}])
    both.observe(4, {"train/loss": 0.5})
    both.observe(5, {"train/loss": 0.5})
    assert both.reason == "STOP_THRESHOLD"


def test_wall_time() -> None:
    clock = StopRules(Train(stop=Stop(wall_time={"seconds": 2, "nanos": 500_000_000})), 0)
    clock.observe_time(2.49)
    assert clock.reason == ""
    clock.observe_time(2.5)
    assert clock.reason == "STOP_WALL_TIME"


def evaluations_until_flat(metric: str, values: list[float], **plateau: Any) -> int:
    each = rules(plateau={"metric": metric, **plateau})
    for number, value in enumerate(values, start=1):
        each.observe_evaluation({metric: value})
        if each.reason:
            assert each.reason == "STOP_PLATEAU"
            return number
    return 0


def test_a_plateau_is_a_number_of_evaluations_without_improvement() -> None:
    falling = [5.0, 4.0, 3.0, 3.0, 3.5, 2.9]
    assert evaluations_until_flat("test/loss", falling, evaluations=2) == 5
    assert evaluations_until_flat("test/loss", falling, evaluations=3) == 0
    assert evaluations_until_flat("test/accuracy", [0.5, 0.6, 0.7, 0.7], evaluations=1) == 4
    assert evaluations_until_flat("test/loss", [5.0], evaluations=1) == 0


def test_an_improvement_must_exceed_the_smallest_change() -> None:
    slow = [1.0, 0.95, 0.90, 0.85]
    assert evaluations_until_flat("test/loss", slow, evaluations=1, min_change=0.1) == 2
    assert evaluations_until_flat("test/loss", slow, evaluations=1, min_change=0.01) == 0


def test_getting_worse_is_no_improvement_but_for_unknown_metrics_it_is_a_change() -> None:
    rising = [1.0, 2.0, 3.0, 4.0]
    assert evaluations_until_flat("test/loss", rising, evaluations=2) == 3
    assert evaluations_until_flat("test/widgets", rising, evaluations=2) == 0
    assert evaluations_until_flat("test/widgets", [1.0, 2.0, 2.0, 2.0], evaluations=2) == 4


@given(
    values=st.lists(st.floats(-10, 10, allow_nan=False), min_size=2, max_size=30),
    cut=st.integers(0, 29),
    patience=st.integers(1, 5),
    metric=st.sampled_from(["test/loss", "test/accuracy", "test/widgets"]),
)
def test_a_restored_plateau_goes_on_as_if_nothing_had_happened(
    values: list[float], cut: int, patience: int, metric: str
) -> None:
    plateau = {"metric": metric, "evaluations": patience, "min_change": 0.5}
    whole, first = rules(plateau=plateau), rules(plateau=plateau)
    second = rules(plateau=plateau)
    for value in values[:cut]:
        whole.observe_evaluation({metric: value})
        first.observe_evaluation({metric: value})
    if whole.reason:
        return
    second.restore(json.loads(json.dumps(first.state())))
    for value in values[cut:]:
        whole.observe_evaluation({metric: value})
        second.observe_evaluation({metric: value})
        assert whole.reason == second.reason


def test_the_state_does_not_grow_with_the_job() -> None:
    each = rules(plateau={"metric": "test/loss", "evaluations": 3})
    for number in range(1000):
        each.observe_evaluation({"test/loss": 1 / (number + 1)})
    assert len(json.dumps(each.state())) < 200


def test_a_job_that_resumes_with_another_rule_starts_it_from_nothing() -> None:
    resumed = rules(plateau={"metric": "test/loss", "evaluations": 1})
    resumed.restore(rules(3, steps=3).state())
    resumed.observe_evaluation({"test/loss": 1.0})
    assert resumed.reason == ""


@pytest.mark.parametrize(("before", "stops"), [("test/accuracy", False), ("test/loss", True)])
def test_what_was_seen_of_another_metric_is_not_taken_over(before: str, stops: bool) -> None:
    first = rules(plateau={"metric": before, "evaluations": 2})
    first.observe_evaluation({before: 0.9})
    resumed = rules(plateau={"metric": "test/loss", "evaluations": 1})
    resumed.restore(first.state())
    resumed.observe_evaluation({"test/loss": 1.0})
    assert (resumed.reason == "STOP_PLATEAU") is stops
