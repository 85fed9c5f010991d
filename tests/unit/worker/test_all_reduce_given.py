"""What members of an all-reduce job take from each other where they prove who they are."""

from __future__ import annotations

from typing import Any

import pytest

from phalanx.errors import PermissionDenied, PhalanxError
from phalanx.given import sealed
from phalanx.v1 import aggregation_service_pb2 as pb
from phalanx.v1.training_pb2 import GivenNodes, TreeNode
from tests.unit.worker.all_reduce_cluster import Cluster, plan_of, spec_of

PLAN = plan_of(spec_of(3), shards=6, elements=8)
SEALED, OPEN = 1, 2


def started(seed: int) -> Any:
    return Cluster(seed, PLAN, ["w0", "w1", "w2"])


def given(job: Any, worker_id: str, **fields: Any) -> Any:
    nodes = GivenNodes(**{"job_id": "job-1", "term": 1, "worker_id": worker_id, **fields})
    return sealed(job.seal_key, nodes)


def field_of(error: PhalanxError) -> list[str]:
    assert error.reason == "NOT_YOURS"
    return [each.field for each in error.violations]


def hello(worker_id: str, shown: Any = None) -> pb.ExchangeHello:
    return pb.ExchangeHello(job_id="job-1", term=1, worker_id=worker_id, given=shown)


def frame(first: int, span: int = 1, vector: str = "gradient") -> pb.ExchangeRequestHeader:
    node = TreeNode(first=first, span=span)
    return pb.ExchangeRequestHeader(
        frame=pb.ContributionFrame(term=1, step=0, node=node, vector=vector)
    )


def test_whoever_was_given_nothing_gets_no_stream() -> None:
    job = started(SEALED)
    w0 = job.members["w0"].core
    for shown in (None, given(job, "w2"), given(job, "w1", term=2), given(job, "w1", job_id="x")):
        with pytest.raises(PermissionDenied) as refused:
            w0.member_opened("key", hello("w1", shown))
        assert field_of(refused.value) == ["hello.given"]
    w0.member_opened("key", hello("w1", given(job, "w1")))
    started(OPEN).members["w0"].core.member_opened("key", hello("w1"))


def test_contributions_of_others_are_refused() -> None:
    job = started(SEALED)
    w0 = job.members["w0"].core
    own = given(job, "w1", train_nodes=[TreeNode(first=2, span=2)])
    w0.member_opened("key", hello("w1", own))
    for foreign in (frame(0), frame(4), frame(0, 4)):
        with pytest.raises(PermissionDenied) as refused:
            w0.member_said("key", foreign, memoryview(b""))
        assert field_of(refused.value) == ["frame.node"]
    with pytest.raises(PhalanxError) as other:
        # Of its own node it is the frame that is looked at.
        w0.member_said("key", frame(2), memoryview(b""))
    assert other.value.reason != "NOT_YOURS"


def test_copies_that_an_owner_wants_are_given() -> None:
    job = started(SEALED)
    w0 = job.members["w0"].core
    w0.member_opened("key", hello("w1", given(job, "w1", train_nodes=[TreeNode(first=2, span=2)])))
    copies = given(job, "w1", copies=[TreeNode(first=4, span=1)])
    w0.member_said("key", pb.ExchangeRequestHeader(given=copies), memoryview(b""))
    for first, refusal in ((4, ""), (5, "NOT_YOURS")):
        with pytest.raises(PhalanxError) as refused:
            w0.member_said("key", frame(first), memoryview(b""))
        assert (refused.value.reason == "NOT_YOURS") == bool(refusal)
    forged = pb.ExchangeRequestHeader(given=copies)
    forged.given.seal = bytes(32)
    with pytest.raises(PermissionDenied) as denied:
        w0.member_said("key", forged, memoryview(b""))
    assert field_of(denied.value) == ["given"]
