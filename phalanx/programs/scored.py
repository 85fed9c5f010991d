"""What the programs that put rows through a stored model have in common."""

from __future__ import annotations

from collections.abc import Iterator

from phalanx.errors import Violation
from phalanx.ids import reference_complaint
from phalanx.programs.base import stored_bytes
from phalanx.v1.dataset_service_pb2 import Dataset
from phalanx.v1.job_spec_pb2 import JobSpec


def default_split(dataset: Dataset) -> str:
    """Return the split that was held out: test, else validation, else train."""
    return next((each for each in ("test", "validation") if dataset.rows.get(each, 0)), "train")


def block_bytes(spec: JobSpec, dataset: Dataset) -> int:
    """Return about how much memory the rows of a shard take, as read and as they are used."""
    rows = -(-dataset.rows.get(spec.data.split, 0) // max(1, spec.data.shards))
    if dataset.format == "csr":
        return 3 * stored_bytes(dataset, rows)
    return 3 * 8 * rows * dataset.features


def model_violations(spec: JobSpec, path: str, name: str) -> Iterator[Violation]:
    """Yield what is wrong with a program that takes a model."""
    complaint = reference_complaint(name, "phalanx models list")
    if complaint:
        yield Violation(path, complaint)
    if spec.seed:
        yield Violation("seed", "changes nothing, as nothing is drawn here; leave it out")
    if spec.data.rows.stratified:
        yield Violation("data.rows.stratified", "changes nothing here; leave it out")
