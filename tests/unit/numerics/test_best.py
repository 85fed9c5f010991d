"""Keeping the best evaluation: which one that is, what records say of it, and after a restore."""

import json
import math
from typing import Any

import pytest
from google.protobuf.json_format import ParseDict
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.testing.datasets import StoredDataset, classification, store
from phalanx.testing.plans import plan_for
from phalanx.training.best import BestRule, Kept, kept_in, missing_metric
from phalanx.training.decisions import RootDecider
from phalanx.training.local import Progress, TrainedModel, train_in_process
from phalanx.v1.job_spec_pb2 import JobSpec, Output
from phalanx.v1.training_pb2 import GoRecord, JobPlan

ROWS = 100
ENDS = (GoRecord.ACTION_STOP, GoRecord.ACTION_PAUSE, GoRecord.ACTION_FAIL)


def rule(metric: str = "test/accuracy", **bound: float) -> BestRule:
    return BestRule(Output(best={"metric": metric, **bound}))


def kept_of(each: BestRule, name: str, values: list[float]) -> tuple[int, float] | None:
    for step, value in enumerate(values, start=1):
        each.observe(step, {name: value}, {name: value})
    return None if each.kept is None else (each.kept.step, each.kept.value)


@pytest.mark.parametrize(
    ("metric", "bound", "values", "kept"),
    [
        ("test/accuracy", {}, [0.1, 0.7, 0.5], (2, 0.7)),
        ("test/loss", {}, [3.0, 1.0, 2.0], (2, 1.0)),
        ("test/accuracy", {"at_most": 1.0}, [0.7, 0.1, 0.5], (2, 0.1)),
        ("test/lift", {"at_least": 0.0}, [0.7, 0.9, 0.5], (2, 0.9)),
        # Of equal ones the first.
        ("test/accuracy", {}, [0.5, 0.7, 0.7], (2, 0.7)),
        ("test/loss", {}, [1.0, 1.0, 2.0], (1, 1.0)),
        # Only one within the bound.
        ("test/accuracy", {"at_least": 0.7}, [0.6, 0.7, 0.65], (2, 0.7)),
        ("test/loss", {"at_most": 0.5}, [1.0, 0.9, 0.8], None),
        # What is not finite is no better than anything.
        ("test/accuracy", {}, [math.nan, 0.2, math.inf, math.nan], (2, 0.2)),
    ],
)
def test_which_evaluation_is_the_best(
    metric: str, bound: dict[str, float], values: list[float], kept: tuple[int, float] | None
) -> None:
    assert kept_of(rule(metric, **bound), metric, values) == kept


def test_without_the_field_nothing_is_kept() -> None:
    each = BestRule(Output())
    each.observe(1, {"test/accuracy": 0.9}, {})
    assert each.kept is None
    assert each.state() is None


def test_an_evaluation_that_lacks_the_metric_is_no_candidate() -> None:
    each = rule("test/accuracy")
    each.observe(1, {"test/loss": 0.9}, {"test/loss": 0.9})
    assert each.kept is None


def test_what_was_told_of_the_step_is_kept_with_it() -> None:
    each = rule("test/accuracy")
    told = {"train/loss": 0.5, "test/loss": math.nan}
    each.observe(4, {"test/accuracy": 0.75, "test/loss": math.nan}, told)
    assert each.kept == Kept(
        4, "test/accuracy", 0.75, {"train/loss": 0.5, "test/accuracy": 0.75}
    ), "a metric that is compared is told, whether it is shown otherwise or not"
    assert each.kept.message().step == 4


@pytest.mark.parametrize(
    ("other", "taken"),
    [
        ({"metric": "test/accuracy"}, True),
        ({"metric": "test/accuracy", "at_least": 0.7}, True),
        ({"metric": "test/accuracy", "at_least": 0.8}, False),
        ({"metric": "test/accuracy", "at_most": 1.0}, False),
        ({"metric": "test/loss"}, False),
        (None, False),
    ],
)
def test_another_rule_takes_over_only_what_it_would_keep(
    other: dict[str, Any] | None, taken: bool
) -> None:
    first = rule("test/accuracy")
    first.observe(7, {"test/accuracy": 0.75}, {"train/loss": 0.5})
    state = {"best": json.loads(json.dumps(first.state()))}
    assert kept_in(state) == first.kept
    second = BestRule(Output() if other is None else Output(best=other))
    second.restore(state)
    assert (second.kept == first.kept) is taken
    assert taken or second.kept is None


def test_checkpoints_from_before_the_field_have_none() -> None:
    each = rule()
    each.restore({})
    assert each.kept is None
    assert kept_in({}) is None


def test_a_metric_that_user_code_does_not_measure_is_told() -> None:
    spec = JobSpec()
    spec.train.evaluation.split = "test"
    assert missing_metric(spec, ["loss"]) == ""
    spec.output.best.metric = "test/accuracy"
    assert missing_metric(spec, ["loss", "correct"]) == ""
    assert "evaluations of this job give test/loss" in missing_metric(spec, ["loss"])
    assert "give nothing" in missing_metric(spec, [])


# The root's records


def make_plan(document: dict[str, Any], evaluation_sums: tuple[str, ...] = ("loss",)) -> JobPlan:
    spec = ParseDict(document, JobSpec())
    return JobPlan(
        job_id="j",
        spec=spec.SerializeToString(),
        shards=4,
        train_rows=ROWS,
        rows_per_leaf=5,
        steps_per_epoch=5,
        total_steps=spec.train.stop.steps,
        evaluation_shards=2,
        evaluation_rows=20,
        evaluation_sums=evaluation_sums,
    )


class Curve:
    """Carries out records; the evaluation of a version gives the loss that stands for it."""

    def __init__(self, losses: list[float]) -> None:
        self._losses = losses
        self.records: list[GoRecord] = []
        self.states: dict[int, str] = {}

    def run(self, decider: RootDecider, go: GoRecord) -> list[GoRecord]:
        while True:
            self.records.append(go)
            if go.checkpoint:
                self.states[go.version] = decider.state()
            if go.action in ENDS:
                return self.records
            if go.action == GoRecord.ACTION_INITIALISE:
                go = decider.initialised(0)
            elif go.action == GoRecord.ACTION_EVALUATE:
                loss = self._losses[go.version % len(self._losses)]
                go = decider.evaluated([20 * loss], 20, 0)
            else:
                go = decider.committed(go.version + 1, 20, 40.0, 0)


def keeping(losses: list[float], **train: Any) -> list[GoRecord]:
    train = {"evaluation": {"split": "test", "every_steps": 1}, **train}
    plan = make_plan({"output": {"best": {"metric": "test/loss"}}, "train": train})
    decider = RootDecider(plan, 1)
    return Curve(losses).run(decider, decider.start())


def best_of(records: list[GoRecord]) -> list[int | None]:
    """The best version by the last record of each version."""
    last = {go.version: go for go in records}
    return [go.best_version if go.HasField("best_version") else None for go in last.values()]


def test_every_record_says_which_version_is_the_best_so_far() -> None:
    records = keeping([9.0, 5.0, 7.0, 3.0, 3.0, 4.0], stop={"steps": 5})
    assert best_of(records) == [None, 1, 1, 3, 3, 3]
    first = {go.version: go for go in reversed(records)}
    assert first[3].best_version == 1, "before it is evaluated nobody knows that it is better"


def test_each_better_version_is_checkpointed_as_soon_as_it_is_known() -> None:
    records = keeping([9.0, 5.0, 7.0, 3.0, 3.0, 4.0], stop={"steps": 5})
    assert [go.version for go in records if go.checkpoint] == [1, 3, 5]
    assert [go.action for go in records if go.checkpoint and go.version == 3] == [
        GoRecord.ACTION_TRAIN
    ]


def test_other_checkpoints_come_as_they_would() -> None:
    records = keeping(
        [9.0, 5.0, 7.0, 3.0, 3.0, 4.0], stop={"steps": 5}, checkpoints={"every_steps": 2}
    )
    assert [go.version for go in records if go.checkpoint] == [1, 2, 3, 4, 5]


def test_a_job_that_ends_since_nothing_gets_better_keeps_the_best_and_not_the_last() -> None:
    losses = [9.0, 5.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    plateau = {"metric": "test/loss", "evaluations": 3}
    records = keeping(losses, stop={"steps": 50, "plateau": plateau})
    last = records[-1]
    assert (last.action, last.reason) == (GoRecord.ACTION_STOP, "STOP_PLATEAU")
    assert (last.version, last.best_version) == (5, 2)


def test_the_last_evaluation_may_be_the_best() -> None:
    rule = {"metric": "test/loss", "atMost": 2.0}
    records = keeping([9.0, 5.0, 3.0, 2.0], stop={"steps": 50, "thresholds": [rule]})
    assert (records[-1].version, records[-1].best_version) == (3, 3)


def test_records_of_other_jobs_say_nothing_of_it() -> None:
    plan = make_plan({"train": {"stop": {"steps": 4}, "evaluation": {"split": "test"}}})
    decider = RootDecider(plan, 1)
    curve = Curve([1.0])
    assert not any(go.HasField("best_version") for go in curve.run(decider, decider.start()))
    assert "best" not in decider.state()


@given(
    losses=st.lists(st.integers(0, 4), min_size=3, max_size=30),
    every=st.integers(1, 4),
    saved=st.integers(0, 5),
    bound=st.sampled_from([{}, {"atMost": 2.0}, {"atLeast": 1.0}]),
)
@settings(max_examples=150, deadline=None)
def test_a_restored_job_keeps_the_same(
    losses: list[int], every: int, saved: int, bound: dict[str, float]
) -> None:
    document = {
        "output": {"best": {"metric": "test/loss", **bound}},
        "train": {
            "stop": {"steps": len(losses) - 1},
            "evaluation": {"split": "test", "every_steps": every},
            "checkpoints": {"every_steps": saved},
        },
    }
    plan = make_plan(document)
    curve, decider = Curve([float(each) for each in losses]), RootDecider(plan, 1)
    records = curve.run(decider, decider.start())
    for version, state in curve.states.items():
        again = RootDecider(plan, 2)
        first = again.restore(version, state)
        later = Curve([float(each) for each in losses])
        rest = later.run(again, first)
        expected = [go for go in records if go.version > version]
        found = [go for go in rest if go.version > version]
        for go in (*expected, *found):
            go.term = 1
        assert found == expected
        assert again.best == decider.best
        before = next(go for go in reversed(records) if go.version == version)
        assert first.HasField("best_version") == before.HasField("best_version")
        assert first.best_version == before.best_version


# In one process


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> StoredDataset:
    features, targets = classification(700, 8, 3)
    return store(tmp_path_factory.mktemp("blobs"), features, targets, test=0.2, chunk_bytes=4096)


def trained(
    dataset: StoredDataset, best: dict[str, Any] | None, steps: int = 12, **options: Any
) -> TrainedModel:
    # So high a rate that the loss goes up and down.
    train = {
        "model": {"mlp": {"hidden": [9]}},
        "optimizer": {"adam": {"learning_rate": 3.0}},
        "batch_size": 112,
        "stop": {"steps": steps},
        "evaluation": {"every_steps": 1},
    }
    output = {} if best is None else {"best": best}
    plan = plan_for(
        dataset, train, data={"name": "data", "shards": 7}, seed=3, output=output
    )  # fmt: skip
    return train_in_process(plan, dataset.manifest, dataset.fetch, **options)


def test_the_model_has_the_parameters_of_the_best_evaluation(dataset: StoredDataset) -> None:
    whole = trained(dataset, None)
    losses = {step: value for step, name, value in whole.points if name == "test/loss"}
    best_step = min(losses, key=lambda step: (losses[step], step))
    assert best_step < 12, "the last evaluation is the best, which shows nothing"
    told: list[Progress] = []
    kept = trained(dataset, {"metric": "test/loss"}, on_progress=told.append)
    assert kept.best is not None
    assert (kept.best.step, kept.best.value) == (best_step, losses[best_step])
    assert (kept.steps, kept.points) == (12, whole.points)
    assert kept.metrics["test/loss"] == losses[best_step]
    assert kept.parameters_sha256 == trained(dataset, None, best_step).parameters_sha256
    assert kept.parameters_sha256 != whole.parameters_sha256
    assert told[-1].best == kept.best


def test_where_no_evaluation_is_within_the_bound_the_last_step_is_kept(
    dataset: StoredDataset,
) -> None:
    kept = trained(dataset, {"metric": "test/accuracy", "at_least": 1.5})
    assert kept.best is None
    assert kept.parameters_sha256 == trained(dataset, None).parameters_sha256
