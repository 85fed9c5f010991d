"""What workers were given, sealed with the key of a term, and what owners make of it."""

from __future__ import annotations

from typing import Any

import pytest

from phalanx.errors import PermissionDenied
from phalanx.given import Covered, GivenWork, opened, sealed, was_given
from phalanx.v1.aggregation_service_pb2 import ContributionFrame
from phalanx.v1.coordination_service_pb2 import HeldWorkerJob
from phalanx.v1.training_pb2 import Given, GivenNodes, JobPlan, TreeNode

KEY, OTHER = b"k" * 32, b"o" * 32
PLAN = JobPlan(job_id="job-1", shards=6, evaluation_shards=3)


def node(first: int, span: int = 1) -> TreeNode:
    return TreeNode(first=first, span=span)


def nodes(**fields: Any) -> GivenNodes:
    return GivenNodes(**{"job_id": "job-1", "term": 3, "worker_id": "w-1", **fields})


def given(key: bytes = KEY, **fields: Any) -> Given:
    shown = sealed(key, nodes(**fields))
    assert shown is not None
    return shown


def fields_of(refused: PermissionDenied) -> list[str]:
    assert refused.reason == "NOT_YOURS"
    return [each.field for each in refused.violations]


@pytest.mark.parametrize(
    "shown",
    [
        Given(),
        given(OTHER),
        given(worker_id="w-2"),
        given(term=2),
        given(job_id="job-2"),
        Given(nodes=given(train_nodes=[node(0)]).nodes, seal=given().seal),
    ],
)
def test_only_what_was_given_to_this_worker_in_this_term_counts(shown: Given) -> None:
    with pytest.raises(PermissionDenied) as refused:
        opened(KEY, shown, "job-1", 3, "w-1", "hello.given")
    assert fields_of(refused.value) == ["hello.given"]


def test_without_a_key_nothing_is_shown_or_asked_for() -> None:
    assert sealed(b"", nodes()) is None
    owner = GivenWork(PLAN, 3, b"")
    owner.show("w-1", Given(), "hello.given")
    owner.check_frame("w-1", ContributionFrame(node=node(4)))
    owner.check_shards("w-1", [5], "shards")
    assert owner.order("w-1", [node(4)]) is None
    assert was_given(b"", "w-1", HeldWorkerJob(job_id="job-1", term=3))


def test_a_contribution_is_of_nodes_that_were_given() -> None:
    owner = GivenWork(PLAN, 3, KEY)

    def takes(vector: str = "gradient", worker: str = "w-1", span: int = 1) -> list[int]:
        return [
            first
            for first in range(0, 6, span)
            if _takes(owner, worker, ContributionFrame(node=node(first, span), vector=vector))
        ]

    assert takes() == []
    owner.show("w-1", given(train_nodes=[node(0, 2)], evaluation_nodes=[node(2)]), "given")
    assert takes() == [0, 1]
    assert takes(span=2) == [0]
    assert takes(span=4) == []
    assert takes(worker="w-2") == []
    # Parameters that a job begins with, and states of nodes, are of shards as gradients are.
    assert takes("parameters") == takes("state") == [0, 1]
    # Shards that there are not are nobody's: whoever has the tree says so.
    assert takes("evaluation") == [2, 3, 4, 5]
    # What was given stays given: it may be in flight. The edge of the tree reaches further.
    owner.show("w-1", given(train_nodes=[node(4, 2)]), "given")
    assert takes(span=2) == [0, 4]
    assert takes(span=4) == [4]


def _takes(owner: GivenWork, worker_id: str, frame: ContributionFrame) -> bool:
    try:
        owner.check_frame(worker_id, frame)
    except PermissionDenied as error:
        return fields_of(error) != ["frame.node"]
    return True


def test_copies_are_given_by_an_owner_for_all_of_them() -> None:
    orders, other = GivenWork(PLAN, 3, KEY), GivenWork(PLAN, 3, KEY)
    frame = ContributionFrame(node=node(5), copy=True)
    with pytest.raises(PermissionDenied):
        other.check_frame("w-1", frame)
    order = orders.order("w-1", [node(5)])
    assert order is not None
    other.show("w-1", order, "given")
    other.check_frame("w-1", frame)
    with pytest.raises(PermissionDenied):
        other.show("w-2", order, "given")


def test_leaves_are_started_where_their_shards_were_given() -> None:
    owner = GivenWork(PLAN, 3, KEY)
    owner.show("w-1", given(train_nodes=[node(2, 2)]), "hello.given")
    owner.check_shards("w-1", [2, 3], "starts_wanted.shards")
    with pytest.raises(PermissionDenied) as refused:
        owner.check_shards("w-1", [3, 4], "starts_wanted.shards")
    assert fields_of(refused.value) == ["starts_wanted.shards"]


def test_a_worker_keeps_no_more_proofs_than_there_are_shards() -> None:
    covered = Covered(PLAN)
    assert covered.add(nodes(train_nodes=[node(0, 2)]))
    assert not covered.add(nodes(train_nodes=[node(1)]))
    assert covered.add(nodes(copies=[node(1)]))
    assert not covered.add(nodes(copies=[node(1)], train_nodes=[node(0)]))


def test_control_believes_a_worker_what_it_was_given() -> None:
    held = HeldWorkerJob(job_id="job-1", term=3, train_nodes=[node(0, 2)])
    assert not was_given(KEY, "w-1", held)
    held.given.CopyFrom(given(train_nodes=[node(0, 2)]))
    assert was_given(KEY, "w-1", held)
    assert not was_given(KEY, "w-2", held)
    held.train_nodes.append(node(2))
    assert not was_given(KEY, "w-1", held)
