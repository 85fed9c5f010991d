"""Plans of jobs over data sets of `phalanx.testing.datasets`, made the way control makes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf.json_format import ParseDict

from phalanx.data.choice import RawColumns
from phalanx.data.described import described
from phalanx.specs import job_plan, prepare
from phalanx.testing.datasets import StoredDataset
from phalanx.v1.dataset_service_pb2 import Dataset
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import JobPlan


def dataset_message(stored: StoredDataset, name: str = "data") -> Dataset:
    """What storage says of a data set."""
    message = described(stored.manifest, stored.manifest_digest())
    message.MergeFrom(Dataset(namespace="default", name=name, version=1))
    return message


def plan_for(stored: StoredDataset, train: Mapping[str, Any], **spec: Any) -> JobPlan:
    """The plan of a job that trains on a data set.

    ``train`` is the JSON of the program, ``spec`` further fields of the job. Raises what a
    submission would.
    """
    document = {"name": "test", "data": {"name": "data"}, "train": train, **spec}
    message, columns = dataset_message(stored), RawColumns.of(stored.manifest)
    return job_plan(prepare(ParseDict(document, JobSpec()), message, columns), message, "job-test")
