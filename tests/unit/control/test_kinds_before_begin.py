"""Of which kind the workers of a job are is open until its first term: who described it may be
gone by then."""

from __future__ import annotations

from typing import Any

import pytest

from phalanx.v1.job_pb2 import Failure
from phalanx.v1.job_spec_pb2 import JobSpec
from tests.unit.control.test_kinds import (
    A100,
    H100,
    NEW,
    OLD,
    OTHER,
    OTHER_TORCH,
    answer,
    asked,
    by_hand,
    caught,
    excluded,
    gpu,
    hosts,
    plan,
    torch_job,
    verified,
    verified_on_gpus,
)


def all_reduce(spec: JobSpec) -> None:
    torch_job(spec)
    spec.train.all_reduce.SetInParent()


def test_who_described_a_job_is_gone_before_there_is_an_aggregator(cluster: Any) -> None:
    by_hand(cluster)
    cluster.worker("old", **OLD)
    cluster.submit(edit=torch_job)
    cluster.kill("a1")
    answer(cluster, "old")
    assert cluster.state() == "QUEUED"
    cluster.kill("old")
    cluster.worker("w1", **NEW)
    cluster.aggregator("a2")
    assert asked(cluster) == ["w1"]
    answer(cluster, "w1")
    assert cluster.state() == "RUNNING"
    assert hosts(cluster) == ["w1"]
    assert dict(plan(cluster).equipment.libraries) == {"torch": "2.13.0"}


def test_who_described_a_job_is_gone_before_storage_has_raised_its_term(cluster: Any) -> None:
    by_hand(cluster)
    cluster.worker("old", **OLD)
    cluster.submit(edit=torch_job)
    cluster.storage_up = False
    answer(cluster, "old")
    cluster.kill("old")
    cluster.worker("w1", **NEW)
    cluster.storage_up = True
    cluster.perform()
    cluster.run_operations()
    assert asked(cluster) == ["w1"]
    answer(cluster, "w1")
    assert cluster.state() == "RUNNING"
    assert hosts(cluster) == ["w1"]


def test_what_a_larger_worker_of_another_kind_cannot_build_is_begun_without_it(
    cluster: Any,
) -> None:
    by_hand(cluster)
    cluster.worker("large", slots=16, address="127.0.0.1:1", **OLD)
    cluster.worker("w1", address="127.0.0.1:2", **NEW)
    cluster.submit(edit=all_reduce)
    assert asked(cluster) == ["large"]
    failure = Failure(code="JOB_DATA", message="the disk is full", shard=-1)
    cluster.describe(cluster.sessions["large"], "job-1", failure=failure)
    answer(cluster, "w1")
    assert cluster.state() == "RUNNING"
    assert excluded(cluster) == {"large": OTHER_TORCH}


def test_nobody_is_told_that_it_takes_no_part_in_what_it_described(cluster: Any) -> None:
    by_hand(cluster)
    cluster.worker("large", slots=16, **OLD)
    cluster.worker("w1", **NEW)
    cluster.submit(edit=torch_job)
    failure = Failure(code="JOB_DATA", message="the disk is full", shard=-1)
    cluster.describe(cluster.sessions["large"], "job-1", failure=failure)
    cluster.events.clear()
    answer(cluster, "w1")
    told = {each.worker_id for each in cluster.events if each.type == "WORKER_INELIGIBLE"}
    assert (hosts(cluster), told) == (["w1"], set())


@pytest.mark.parametrize(
    ("edit", "first", "others"),
    [(verified, OLD, NEW), (verified_on_gpus, gpu(A100), gpu(H100))],
)
def test_those_that_agree_are_of_one_kind(
    cluster: Any, edit: Any, first: dict[str, Any], others: dict[str, Any]
) -> None:
    """One of another kind, which is gone or says what is not so, would have it wait for ever."""
    by_hand(cluster)
    cluster.worker("first", **first)
    cluster.submit(edit=edit)
    answer(cluster, "first")
    for name in ("w1", "w2"):
        cluster.worker(name, **others)
    assert asked(cluster) == ["w1", "w2"]
    answer(cluster, "w1")
    assert cluster.state() == "QUEUED"
    answer(cluster, "w2")
    assert cluster.state() == "RUNNING"
    assert hosts(cluster) == ["w1", "w2"]
    assert not caught(cluster)


def test_where_those_of_one_kind_do_not_agree_those_of_another_are_asked(cluster: Any) -> None:
    """One that lies may not have the others wait, whichever kind it says it is of."""
    by_hand(cluster)
    for name, has in {"old1": OLD, "old2": OLD, "w1": NEW, "w2": NEW}.items():
        cluster.worker(name, slots=8 if has is OLD else 1, **has)
    cluster.submit(edit=verified)
    assert asked(cluster) == ["old1", "old2"]
    answer(cluster, "old1")
    assert asked(cluster) == ["old2"]
    answer(cluster, "old2", OTHER)
    assert asked(cluster) == ["w1", "w2"]
    answer(cluster, "w1")
    answer(cluster, "w2")
    assert cluster.state() == "RUNNING"
    assert hosts(cluster) == ["w1", "w2"]
    assert not caught(cluster), "it is open which of the two is right"


def test_where_those_of_no_kind_agree_the_job_says_so_and_a_further_one_is_asked(
    cluster: Any,
) -> None:
    by_hand(cluster)
    for name in ("old1", "old2"):
        cluster.worker(name, **OLD)
    cluster.worker("w1", slots=1, **NEW)
    cluster.submit(edit=verified)
    answer(cluster, "old1")
    answer(cluster, "old2", OTHER)
    assert asked(cluster) == ["w1"]
    answer(cluster, "w1")
    assert cluster.job().reason == "WAITING_FOR_VERIFIERS"
    cluster.worker("old3", **OLD)
    assert asked(cluster) == ["old3"]
    answer(cluster, "old3")
    assert cluster.state() == "RUNNING"
    assert caught(cluster) == ["old2"]
