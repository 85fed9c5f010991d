"""Rule 16: a worker takes part in a reproducible job only with the leaf that the job began with."""

from __future__ import annotations

from typing import Any

import pytest

from phalanx.v1 import coordination_service_pb2 as pb
from phalanx.v1.training_pb2 import Layout, TensorSpec

ALL = set(range(16))
RIGHT, OTHER = "aa" * 32, "bb" * 32
LAYOUT = Layout(
    tensors=[TensorSpec(name="w", shape=[64, 10], decay=True)],
    dtype="float32",
    element_count=640,
)


def _start(cluster: Any, edit: Any = None) -> None:
    """Run job-1, which began with the leaf RIGHT, on w1."""
    cluster.auto = False
    session = cluster.worker("w1")
    aggregator = cluster.aggregator()
    cluster.submit(edit=edit)
    described = {"layout": LAYOUT, "evaluation_sums": ["loss"], "leaf_sha256": RIGHT}
    cluster.describe(session, "job-1", **described)
    cluster.say(aggregator, ranges_ready=pb.RangesReady(job_id="job-1", term=1))
    _ready(cluster, "w1")


def _ready(cluster: Any, name: str, leaf_sha256: str = RIGHT, **fields: Any) -> None:
    ready = pb.WorkerJobReady(job_id="job-1", term=1, leaf_sha256=leaf_sha256, **fields)
    cluster.say(cluster.sessions[name], worker_job_ready=ready)


def _held(cluster: Any, name: str, **fields: Any) -> pb.HeldWorkerJob:
    assigned = cluster.told(name, "assign_job")[-1]
    return pb.HeldWorkerJob(
        job_id="job-1",
        term=1,
        placement=assigned.placement,
        train_nodes=assigned.train_nodes,
        evaluation_nodes=assigned.evaluation_nodes,
        **fields,
    )


def test_a_worker_with_the_same_leaf_takes_its_share(cluster: Any) -> None:
    _start(cluster)
    cluster.worker("w2")
    assert cluster.told("w2", "assign_job")[-1].leaf_sha256 == RIGHT
    _ready(cluster, "w2")
    assert len(cluster.shards("w2")) == 8
    assert "WORKER_INELIGIBLE" not in cluster.types()


@pytest.mark.parametrize("leaf_sha256", [OTHER, ""])
def test_a_worker_with_another_leaf_is_left_out(cluster: Any, leaf_sha256: str) -> None:
    _start(cluster)
    cluster.worker("w2")
    _ready(cluster, "w2", leaf_sha256)
    assert not cluster.shards("w2")
    assert cluster.told("w2", "revoke_job")[-1].term == 1
    assert cluster.shards("w1") == ALL
    event = next(each for each in cluster.events if each.type == "WORKER_INELIGIBLE")
    assert event.worker_id == "w2"
    assert RIGHT in event.message
    assert leaf_sha256 in event.message
    told = len(cluster.told("w2", "assign_job"))
    cluster.advance(5.0)
    assert len(cluster.told("w2", "assign_job")) == told
    assert cluster.types().count("WORKER_INELIGIBLE") == 1


def test_shards_that_it_was_given_at_the_start_go_to_others_at_once(cluster: Any) -> None:
    _start(cluster)
    cluster.kill("w1")
    cluster.worker("w2")
    assert cluster.shards("w2") == ALL
    _ready(cluster, "w2", OTHER)
    assert cluster.job().reason == "WAITING_FOR_FINGERPRINT"
    assert "w2" in cluster.job().message
    cluster.worker("w3")
    assert cluster.shards("w3") == ALL
    assert cluster.job().reason == ""
    cluster.worker("w2", incarnation="w2-2")
    assert len(cluster.told("w2", "assign_job")) == 1, "a new start may have other libraries"


def test_a_leaf_that_failed_leaves_the_worker_in(cluster: Any) -> None:
    _start(cluster)
    cluster.worker("w2")
    _ready(cluster, "w2", "", leaf_failed=True)
    assert len(cluster.shards("w2")) == 8


def test_a_tolerant_job_takes_any_leaf(cluster: Any) -> None:
    _start(cluster, lambda spec: spec.reproducibility.tolerant.SetInParent())
    cluster.worker("w2")
    assert cluster.told("w2", "assign_job")[-1].leaf_sha256 == ""
    _ready(cluster, "w2", OTHER)
    assert len(cluster.shards("w2")) == 8


@pytest.mark.parametrize("leaf_sha256", [RIGHT, ""])
def test_who_was_ready_before_a_take_over_stays(cluster: Any, leaf_sha256: str) -> None:
    _start(cluster)
    held = _held(cluster, "w1", ready=True, leaf_sha256=leaf_sha256)
    cluster.lead()
    cluster.worker("w1", held_jobs=[held])
    assert cluster.core.jobs["job-1"].train.held_by("w1") == ALL
    assert not cluster.told("w1", "revoke_job")


def test_after_a_take_over_the_journal_still_knows_the_leaf(cluster: Any) -> None:
    _start(cluster)
    cluster.worker("w2")
    held = {name: _held(cluster, name, ready=name == "w1") for name in ("w1", "w2")}
    held["w2"].leaf_sha256 = OTHER  # told to the leader that died
    cluster.lead()
    cluster.worker("w1", held_jobs=[held["w1"]])
    cluster.worker("w2", held_jobs=[held["w2"]])
    assert cluster.told("w2", "revoke_job")
    assert not cluster.told("w2", "assign_job")
    assert "WORKER_INELIGIBLE" in cluster.types()
    cluster.worker("w3")
    assert cluster.told("w3", "assign_job")[-1].leaf_sha256 == RIGHT
    _ready(cluster, "w3", OTHER)
    assert cluster.told("w3", "revoke_job")


def test_fall_back_takes_a_worker_with_another_leaf(cluster: Any) -> None:
    def fall_back(spec: Any) -> None:
        spec.reproducibility.bitwise.fall_back_after.seconds = 5

    _start(cluster, fall_back)
    cluster.worker("w2")
    _ready(cluster, "w2", OTHER)
    cluster.kill("w1")
    assert cluster.job().reason == "WAITING_FOR_FINGERPRINT"
    cluster.advance(7.0)
    assert "BIT_IDENTITY_LOST" in cluster.types()
    assert cluster.shards("w2") == ALL
    assert cluster.told("w2", "assign_job")[-1].leaf_sha256 == ""
