"""Boosted trees: rounds as the unit of a job, and what leaves remember from step to step."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phalanx.errors import InvalidArgument
from phalanx.models.binned_rows import BinnedRows, RememberedRows, Trees
from phalanx.specs import plan
from phalanx.testing.datasets import StoredDataset, classification, regression, store
from phalanx.testing.plans import dataset_message, plan_for
from phalanx.training.local import TrainedModel, train_in_process
from phalanx.v1.job_spec_pb2 import JobSpec

DEPTH = 3


@pytest.fixture(scope="module", params=[0, 2, 3], ids=["numbers", "two classes", "three"])
def dataset(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    rows = classification(300, 5, request.param) if request.param else regression(300, 5)
    return store(tmp_path_factory.mktemp("blobs"), *rows, test=0.2)


def run(dataset: StoredDataset, **train: Any) -> TrainedModel:
    plan = plan_for(dataset, train, data={"name": "data", "shards": 3})
    return train_in_process(plan, dataset.manifest, dataset.fetch)


def boosting(trees: int, **settings: Any) -> dict[str, Any]:
    return {"boosting": {"trees": trees, "depth": DEPTH, "min_leaf_rows": 5, **settings}}


def steps_of(dataset: StoredDataset) -> tuple[int, int]:
    """Steps before the first tree, and of a round."""
    classes = len(dataset.manifest.classes)
    return (1 if classes else 2), DEPTH * (classes if classes > 2 else 1)


def curve(model: TrainedModel, metric: str) -> dict[int, float]:
    return {step: value for step, name, value in model.points if name == metric}


@pytest.mark.parametrize("every_steps", [0, 1])
def test_an_evaluation_is_of_whole_rounds(dataset: StoredDataset, every_steps: int) -> None:
    first, each = steps_of(dataset)
    model = run(dataset, model=boosting(4), evaluation={"every_steps": every_steps})
    losses = curve(model, "test/loss")
    assert list(losses) == [first + each * rounds for rounds in (1, 2, 3, 4)]
    shorter = run(dataset, model=boosting(2))
    assert shorter.metrics["test/loss"] == losses[first + 2 * each]


def test_the_training_loss_begins_with_the_first_tree(dataset: StoredDataset) -> None:
    first, each = steps_of(dataset)
    losses = curve(run(dataset, model=boosting(2)), "train/loss")
    assert list(losses) == list(range(first + 1, first + 2 * each + 1))
    assert len(set(losses.values())) == 2


def test_a_rule_that_looks_at_the_training_loss_ends_a_job_with_a_round(
    dataset: StoredDataset,
) -> None:
    first, each = steps_of(dataset)
    losses = curve(run(dataset, model=boosting(3)), "train/loss")
    bound = losses[first + each + 1]  # of one round, known while the second one grows
    rule = {"thresholds": [{"metric": "train/loss", "at_most": bound}]}
    model = run(dataset, model=boosting(9), stop=rule)
    assert (model.reason, model.steps) == ("STOP_THRESHOLD", first + 2 * each)


def test_a_job_ends_with_its_last_tree(dataset: StoredDataset) -> None:
    first, each = steps_of(dataset)
    whole = run(dataset, model=boosting(2))
    longer = run(dataset, model=boosting(2), stop={"steps": 1000})
    assert longer.steps == whole.steps == first + 2 * each
    assert longer.parameters_sha256 == whole.parameters_sha256


def test_epochs_of_boosted_trees_are_refused(dataset: StoredDataset) -> None:
    with pytest.raises(InvalidArgument, match=r"stop.epochs: .*give train.model.boosting.trees"):
        run(dataset, model=boosting(2), stop={"epochs": 10})


def test_the_plan_counts_rounds(dataset: StoredDataset) -> None:
    first, each = steps_of(dataset)

    def told(**train: Any) -> Any:
        planned = plan_for(dataset, {"model": boosting(5), **train}, data={"name": "data"})
        return plan(JobSpec.FromString(planned.spec), dataset_message(dataset))

    assert told().evaluations == 5
    assert not any("round" in each for each in told().warnings)
    assert not any("round" in each for each in told(stop={"steps": first + each}).warnings)
    (warning,) = (
        each for each in told(stop={"steps": first + each + 2}).warnings if "round" in each
    )
    assert f"after 2 steps of its {each}: the last trees are smaller" in warning


def test_a_worker_has_room_for_what_leaves_remember(tmp_path: Path) -> None:
    stored = store(tmp_path, *classification(60, 50, 2))
    planned = plan_for(stored, {"model": boosting(2, bins=4)}, data={"name": "data", "shards": 1})
    large, spec = dataset_message(stored), JobSpec.FromString(planned.spec)
    large.rows["train"] = rows = 10**7
    spec.data.shards = 1000
    # One shard at a time is read; the bins and scores of all of them are kept.
    assert plan(spec, large).worker_bytes > rows * (large.features + 8)
    spec.resources.min_workers = 10
    assert plan(spec, large).worker_bytes < rows * (large.features + 8) / 5


def grown(trees: int, value: float = 1.0, base: float = 0.0) -> Trees:
    """Trees of one split at 0.5, each of which adds a value to the rows on its right."""
    nodes: Sequence[Any] = (
        np.tile([0.0, -1.0, -1.0], (trees, 1)),
        np.tile([0.5, 0.0, 0.0], (trees, 1)),
        np.tile([0.0, 0.0, value], (trees, 1)),
    )
    return Trees(np.array([base]), np.array([[0.5]]), nodes)


ROWS = np.array([[0.0], [1.0]])


def scores(rows: BinnedRows) -> list[float]:
    return [float(each) for each in rows.scores[:, 0]]


def test_what_is_remembered_is_used_only_for_the_same_trees() -> None:
    remembered = RememberedRows()
    assert scores(remembered.scored(0, ROWS, grown(3), 0)) == [0, 0]
    assert scores(remembered.scored(0, ROWS, grown(3), 2)) == [0, 2]
    assert scores(remembered.scored(0, ROWS, grown(3), 3)) == [0, 3]
    assert scores(remembered.scored(0, ROWS, grown(3), 1)) == [0, 1]  # after a roll-back
    assert scores(remembered.scored(0, ROWS, grown(3, 5.0), 2)) == [0, 10]
    assert scores(remembered.scored(0, ROWS, grown(3, 5.0, 2.0), 1)) == [2, 7]
    moved = Trees(np.array([2.0]), np.array([[1.5]]), grown(3, 5.0).nodes)
    assert scores(remembered.scored(0, ROWS, moved, 1)) == [2, 2]


def test_shards_that_have_moved_away_are_forgotten() -> None:
    remembered = RememberedRows()
    for shard in (0, 1, 2):
        remembered.scored(shard, ROWS, grown(4), 0)
    for trees in (1, 2):
        remembered.scored(1, ROWS, grown(4), trees)
        remembered.scored(1, ROWS, grown(4), trees)
    assert len(remembered) == 1
    assert scores(remembered.scored(2, ROWS, grown(4), 2)) == [0, 2]
    assert len(remembered) == 2
