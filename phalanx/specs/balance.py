"""Balance of classes: what a spec says of it, written out and checked against the data set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from phalanx.errors import Violation
from phalanx.specs import catalog
from phalanx.v1 import dataset_service_pb2, job_spec_pb2


def by_class(data: job_spec_pb2.Data) -> bool:
    """Whether shards are stretches of an even order of the classes, not of the stored rows."""
    return data.rows.stratified or data.HasField("oversample")


def drawn_rows(stored: Sequence[int], *, oversample: bool) -> tuple[int, ...]:
    """Return how many rows of each class an epoch has, of so many that are stored."""
    longest = max(stored, default=0) if oversample else 0
    return tuple(max(rows, longest) if rows else 0 for rows in stored)


def balanced_weights(stored: Sequence[int]) -> list[float]:
    """Return n / (c · n_y) for each class of n_y rows; 1 for classes without any.

    So every one of the c classes has the same weight in all, and the mean over all rows is 1
    (King and Zeng, Logistic Regression in Rare Events Data, 2001, section 4.2).
    """
    present = sum(rows > 0 for rows in stored)
    return [sum(stored) / (present * rows) if rows else 1.0 for rows in stored]


def train_rows(data: job_spec_pb2.Data, dataset: dataset_service_pb2.Dataset) -> int:
    """Return the rows of an epoch, those that come again included."""
    if data.HasField("oversample") and data.split in dataset.class_rows:
        return sum(drawn_rows(dataset.class_rows[data.split].rows, oversample=True))
    return dataset.rows.get(data.split, 0)


def resolve(data: job_spec_pb2.Data, dataset: dataset_service_pb2.Dataset) -> None:
    """Write the weight of every class, where they are asked for."""
    if not data.HasField("class_weights"):
        return
    weights = data.class_weights.weights
    stored = dataset.class_rows[data.split].rows if data.split in dataset.class_rows else ()
    given = bool(weights)
    for label, balanced in zip(dataset.classes, balanced_weights(stored), strict=False):
        if label not in weights:
            weights[label] = 1.0 if given else balanced


def violations(
    spec: job_spec_pb2.JobSpec, dataset: dataset_service_pb2.Dataset
) -> Iterator[Violation]:
    """Yield what is wrong between a resolved spec and the classes of its data set."""
    data = spec.data
    chosen = data.WhichOneof("balance")
    paths = [f"data.{chosen}"] if chosen else []
    paths += ["data.rows.stratified"] if data.rows.stratified else []
    if paths and dataset.task != catalog.CLASSIFICATION:
        for path in paths:
            yield Violation(path, f"needs classes, and {data.name} is a {dataset.task} data set")
        return
    if chosen == "class_weights":
        yield from _weights(spec, dataset)


def _weights(
    spec: job_spec_pb2.JobSpec, dataset: dataset_service_pb2.Dataset
) -> Iterator[Violation]:
    path, weights = "data.class_weights", spec.data.class_weights.weights
    if spec.train.model.HasField("custom"):
        message = "a custom model computes its own loss; weigh its rows there, or use oversample"
        yield Violation(path, message)
    known = ", ".join(dataset.classes)
    for label, weight in sorted(weights.items()):
        if label not in dataset.classes:
            message = f"{spec.data.name} has no class {label[:40]!r}; it has: {known[:200]}"
            yield Violation(f"{path}.weights.{label[:40]}", message)
        elif weight < 0:
            message = f"must be at least 0, not {weight:g}"
            yield Violation(f"{path}.weights.{label[:40]}", message)
    if weights and not any(weights.values()):
        yield Violation(f"{path}.weights", "are all 0: no example would count")
