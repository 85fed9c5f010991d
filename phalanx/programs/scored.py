"""What the programs that put rows through a stored model have in common."""

from __future__ import annotations

import re
from collections.abc import Iterator

from phalanx.errors import Violation
from phalanx.v1.dataset_service_pb2 import Dataset
from phalanx.v1.job_spec_pb2 import JobSpec

_VERSION = re.compile(
    r"([a-z0-9][a-z0-9._-]{0,127}/)?[a-z0-9][a-z0-9._-]{0,127}(@[1-9][0-9]{0,17})?", re.ASCII
)
_RULE = "write NAME, NAME@VERSION or NAMESPACE/NAME@VERSION; see `phalanx models list`"


def default_split(dataset: Dataset) -> str:
    """Return the split that was held out: test, else validation, else train."""
    return next((each for each in ("test", "validation") if dataset.rows.get(each, 0)), "train")


def block_bytes(spec: JobSpec, dataset: Dataset) -> int:
    """Return about how much memory the rows of a shard take, as read and as they are used."""
    rows = -(-dataset.rows.get(spec.data.split, 0) // max(1, spec.data.shards))
    if dataset.format == "csr":
        return 3 * dataset.size_bytes * rows // max(1, sum(dataset.rows.values()))
    return 3 * 8 * rows * dataset.features


def model_violations(spec: JobSpec, path: str, name: str) -> Iterator[Violation]:
    """Yield what is wrong with a program that takes a model."""
    if not name:
        yield Violation(path, f"is missing; {_RULE}")
    elif not _VERSION.fullmatch(name):
        yield Violation(path, f"{name[:160]!r} is not allowed; {_RULE}")
    if spec.seed:
        yield Violation("seed", "changes nothing, as nothing is drawn here; leave it out")
    if spec.data.rows.stratified:
        yield Violation("data.rows.stratified", "changes nothing here; leave it out")
