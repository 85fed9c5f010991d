"""Who gets the key of a term, and what workers are given with it."""

from __future__ import annotations

from typing import Any

import pytest

from phalanx.given import KEY_BYTES, was_given
from phalanx.v1 import coordination_service_pb2 as pb
from phalanx.v1.job_spec_pb2 import JobSpec

KEY = bytes(range(KEY_BYTES))


def all_reduce(spec: JobSpec) -> None:
    spec.train.all_reduce.SetInParent()


def held(told: Any) -> pb.HeldWorkerJob:
    return pb.HeldWorkerJob(
        job_id=told.plan.job_id,
        term=told.term,
        train_nodes=told.train_nodes,
        evaluation_nodes=told.evaluation_nodes,
        given=told.given,
    )


@pytest.fixture
def sealed(cluster: Any) -> Any:
    cluster.seal_key = KEY
    return cluster


def test_owners_get_the_key_and_workers_what_they_were_given(sealed: Any) -> None:
    sealed.aggregator("a1")
    for name in ("w1", "w2"):
        sealed.worker(name)
    sealed.submit()
    assert sealed.told("a1", "assign_ranges")[-1].seal_key == KEY
    for name, other in (("w1", "w2"), ("w2", "w1")):
        told = sealed.told(name, "assign_job")[-1]
        assert not told.seal_key
        assert was_given(KEY, name, held(told))
        assert not was_given(KEY, other, held(told))
    started = sealed.core.facts.jobs["job-1"].kept.term_started
    assert (started.seal_key, started.workers_own) == (KEY, False)


def test_with_all_reduce_members_get_the_key_and_whoever_prepares_does_not(sealed: Any) -> None:
    for number, name in enumerate(("w1", "w2")):
        sealed.worker(name, address=f"127.0.0.1:{9000 + number}")
    sealed.submit(edit=all_reduce)
    for name in ("w1", "w2"):
        assert sealed.told(name, "assign_job")[-1].seal_key == KEY
    sealed.auto = False
    session = sealed.worker("w3", address="127.0.0.1:9002")
    told = sealed.told("w3", "assign_job")[-1]
    assert not told.seal_key
    assert told.given.seal
    sealed.say(session, worker_job_ready=pb.WorkerJobReady(job_id="job-1", term=told.term))
    assert sealed.told("w3", "assign_job")[-1].seal_key == KEY
    assert sealed.core.facts.jobs["job-1"].kept.term_started.workers_own


def test_where_nobody_proves_who_he_is_nothing_is_sealed(cluster: Any) -> None:
    cluster.aggregator("a1")
    cluster.worker("w1")
    cluster.submit()
    assert not cluster.told("a1", "assign_ranges")[-1].seal_key
    assert not cluster.told("w1", "assign_job")[-1].HasField("given")
