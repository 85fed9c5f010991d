"""What the core of control makes of messages and records of a later version."""

import pytest

from coordinator.control.core.describing import sha256_of
from coordinator.control.core.facts import Facts
from phalanx.errors import FailedPrecondition
from phalanx.messages import known
from phalanx.testing.next_version import UNKNOWN, with_unknown
from phalanx.v1.control_journal_pb2 import ControlRecord, ControlStarted
from phalanx.v1.coordination_service_pb2 import JobDescribed
from phalanx.v1.training_pb2 import Layout


def described() -> JobDescribed:
    layout = Layout(dtype="float32", element_count=36)
    layout.tensors.add(name="w", shape=[12, 3])
    return JobDescribed(job_id="job-1", layout=layout, evaluation_sums=["loss"], leaf_sha256="ab")


def test_descriptions_of_two_versions_are_equal() -> None:
    """Else workers that are upgraded one by one would disagree, and be sent away."""
    later = JobDescribed.FromString(with_unknown(described()))
    assert later != described()
    assert sha256_of(later) == sha256_of(described())
    assert known(later) == described()


def test_a_later_version_may_add_to_a_fact() -> None:
    record = ControlRecord(generation=3, control_started=ControlStarted(control_id="control-1"))
    facts = Facts()
    facts.apply(ControlRecord.FromString(with_unknown(record)))
    assert facts.generation == 3


def test_a_fact_of_a_kind_that_is_not_known_is_refused() -> None:
    """To read over it would be to forget what somebody was told."""
    with pytest.raises(FailedPrecondition, match="a newer Phalanx wrote it") as refused:
        Facts().apply(ControlRecord.FromString(UNKNOWN))
    assert refused.value.reason == "JOURNAL_TOO_NEW"
