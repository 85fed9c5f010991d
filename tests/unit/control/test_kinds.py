"""Of jobs that need libraries or GPUs control knows beforehand which workers give the same bits."""

from __future__ import annotations

from typing import Any

import pytest

from coordinator.control.continuing import origin_of
from coordinator.control.core import events as ev
from coordinator.control.core.eligibility import group_of
from coordinator.control.core.views import worker_view
from coordinator.control.submission import count_eligible
from phalanx.v1 import coordination_service_pb2 as pb
from phalanx.v1.cluster_service_pb2 import Worker
from phalanx.v1.control_journal_pb2 import JobSubmitted
from phalanx.v1.job_pb2 import Failure
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.storage_service_pb2 import CheckpointManifest
from phalanx.v1.training_pb2 import Layout, TensorSpec
from tests.unit.control.conftest import DATASET

RIGHT, OTHER = "aa" * 32, "bb" * 32
OLD, NEW = {"libraries": {"torch": "2.12.0"}}, {"libraries": {"torch": "2.13.0"}}
OTHER_TORCH = "it has PyTorch 2.12.0, and the job runs with 2.13.0"
H100, A100 = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-40GB"
OTHER_GPU = f"its GPU is another one ({A100}, and the job runs on {H100})"


def torch_job(spec: JobSpec) -> None:
    spec.train.model.ClearField("mlp")
    spec.train.model.torch.module = "net:build"
    spec.code.files["net.py"] = "pass"


def verified(spec: JobSpec) -> None:
    torch_job(spec)
    spec.train.verification.replicas = 3


def on_gpus(spec: JobSpec) -> None:
    torch_job(spec)
    spec.resources.gpus = 1


def verified_on_gpus(spec: JobSpec) -> None:
    verified(spec)
    spec.resources.gpus = 1


def gpu(*kinds: str, **others: Any) -> dict[str, Any]:
    return {**NEW, "gpus": 4, "gpu_kinds": kinds, **others}


def answer(cluster: Any, name: str, leaf_sha256: str = RIGHT) -> None:
    tensor = TensorSpec(name="w", shape=[64, 10], decay=True)
    layout = Layout(tensors=[tensor], dtype="float32", element_count=640)
    found = {"layout": layout, "evaluation_sums": ["loss"], "leaf_sha256": leaf_sha256}
    cluster.describe(cluster.sessions[name], "job-1", **found)


def set_up(cluster: Any, name: str, leaf_sha256: str = RIGHT) -> None:
    ready = pb.WorkerJobReady(job_id="job-1", term=1, leaf_sha256=leaf_sha256)
    cluster.say(cluster.sessions[name], worker_job_ready=ready)


def asked(cluster: Any) -> list[str]:
    return sorted(cluster.core.jobs["job-1"].describing)


def hosts(cluster: Any) -> list[str]:
    return sorted(cluster.core.jobs["job-1"].hosts)


def excluded(cluster: Any) -> dict[str, str]:
    return group_of(cluster.core, cluster.core.jobs["job-1"]).excluded


def caught(cluster: Any) -> list[str]:
    return [each.worker_id for each in cluster.events if each.type == "WORKER_QUARANTINED"]


def plan(cluster: Any) -> Any:
    return cluster.core.facts.jobs["job-1"].plan


def by_hand(cluster: Any) -> None:
    """Workers answer when they are told to."""
    cluster.auto = False
    cluster.aggregator()


@pytest.mark.parametrize(
    ("edit", "wanted", "unlike", "why"),
    [
        (verified, NEW, OLD, OTHER_TORCH),
        (verified_on_gpus, gpu(H100), gpu(A100), OTHER_GPU),
        (verified_on_gpus, gpu(H100), gpu(H100, **OLD), OTHER_TORCH),
        (
            verified_on_gpus,
            gpu(H100),
            gpu(A100, H100),
            f"its GPUs are others ({A100}, {H100}, and the job runs on {H100})",
        ),
    ],
)
def test_nobody_asks_a_worker_of_another_kind_and_it_is_no_liar(
    cluster: Any, edit: Any, wanted: Any, unlike: Any, why: str
) -> None:
    by_hand(cluster)
    cluster.worker("a", **unlike)  # the first by name and by age
    cluster.worker("w1", **wanted)
    cluster.worker("w2", **wanted)
    cluster.submit(edit=edit)
    assert asked(cluster) == ["w1", "w2"]
    answer(cluster, "w1")
    answer(cluster, "w2")
    assert cluster.state() == "RUNNING"
    assert excluded(cluster) == {"a": why}
    assert hosts(cluster) == ["w1", "w2"]
    assert not cluster.told("a", "assign_job")
    assert not caught(cluster)
    event = next(each for each in cluster.events if each.type == "WORKER_INELIGIBLE")
    assert (event.worker_id, event.message) == ("a", f"a does not take part: {why}")
    view = worker_view(cluster.core, cluster.core.workers["a"])
    assert (view.state, view.reason) == (Worker.STATE_INELIGIBLE, f"left out of job-1: {why}")


def test_the_plan_tells_what_the_workers_have(cluster: Any) -> None:
    cluster.aggregator()
    cluster.worker("w1", **gpu(H100))
    cluster.submit(edit=on_gpus)
    assert plan(cluster).fingerprint == "f"
    assert dict(plan(cluster).equipment.libraries) == {"torch": "2.13.0"}
    assert list(plan(cluster).equipment.gpu_kinds) == [H100]


def test_a_job_without_gpus_does_not_ask_for_their_kind(cluster: Any) -> None:
    cluster.aggregator()
    cluster.worker("w1", **gpu(H100))
    cluster.worker("w2", **gpu(A100))
    cluster.submit(edit=torch_job)
    assert hosts(cluster) == ["w1", "w2"]
    assert not plan(cluster).equipment.gpu_kinds


def test_to_a_job_that_needs_nothing_versions_are_all_one(cluster: Any) -> None:
    cluster.aggregator()
    cluster.worker("w1", **gpu(H100))
    cluster.worker("w2", **OLD)
    cluster.worker("w3")
    cluster.submit()
    assert hosts(cluster) == ["w1", "w2", "w3"]
    assert not plan(cluster).HasField("equipment")


def test_a_tolerant_job_takes_every_kind(cluster: Any) -> None:
    def tolerant(spec: JobSpec) -> None:
        torch_job(spec)
        spec.reproducibility.tolerant.SetInParent()

    cluster.aggregator()
    cluster.worker("w1", **NEW)
    cluster.worker("w2", **OLD)
    cluster.submit(edit=tolerant)
    assert hosts(cluster) == ["w1", "w2"]
    assert not plan(cluster).HasField("equipment")


def test_one_of_the_same_kind_with_another_leaf_is_caught_as_before(cluster: Any) -> None:
    by_hand(cluster)
    for name in ("w1", "w2", "w3", "w4"):
        cluster.worker(name, **gpu(H100))
    cluster.submit(edit=verified_on_gpus)
    answer(cluster, "w1", OTHER)
    answer(cluster, "w2")
    answer(cluster, "w3")
    assert caught(cluster) == ["w1"]
    set_up(cluster, "w4", OTHER)
    assert caught(cluster) == ["w1", "w4"]


def test_one_of_another_kind_that_was_asked_before_the_others_came_is_no_liar(
    cluster: Any,
) -> None:
    by_hand(cluster)
    cluster.worker("old", **OLD)
    cluster.submit(edit=verified)
    answer(cluster, "old", OTHER)
    for name in ("w1", "w2"):
        cluster.worker(name, **NEW)
    answer(cluster, "w1")
    answer(cluster, "w2")
    assert (cluster.state(), caught(cluster)) == ("RUNNING", [])
    assert excluded(cluster) == {"old": OTHER_TORCH}


@pytest.mark.parametrize("described_by", [(), (H100,)])
def test_a_gpu_that_nobody_knows_is_left_out_by_its_leaf_and_is_no_liar(
    cluster: Any, described_by: tuple[str, ...]
) -> None:
    """An older worker does not tell the kinds, and not every system shows them."""
    by_hand(cluster)
    cluster.worker("w1", **gpu(*described_by))
    cluster.worker("w2", **gpu(*described_by))
    cluster.submit(edit=verified_on_gpus)
    answer(cluster, "w1")
    answer(cluster, "w2")
    cluster.worker("like", **gpu())
    cluster.worker("unlike", **gpu())
    assert hosts(cluster) == ["like", "unlike", "w1", "w2"]
    set_up(cluster, "like")
    set_up(cluster, "unlike", OTHER)
    assert hosts(cluster) == ["like", "w1", "w2"]
    assert not caught(cluster)


def test_of_descriptions_on_gpus_that_nobody_knows_none_is_a_lie(cluster: Any) -> None:
    by_hand(cluster)
    for name in ("w1", "w2", "w3"):
        cluster.worker(name, **gpu())
    cluster.submit(edit=verified_on_gpus)
    answer(cluster, "w1", OTHER)
    answer(cluster, "w2")
    answer(cluster, "w3")
    assert (cluster.state(), caught(cluster)) == ("RUNNING", [])


def test_of_equal_descriptions_that_which_tells_most_counts(cluster: Any) -> None:
    by_hand(cluster)
    cluster.worker("w1", **gpu())
    cluster.worker("w2", **gpu(H100))
    cluster.submit(edit=verified_on_gpus)
    assert asked(cluster) == ["w1", "w2"], "what nobody knows is no reason to wait"
    answer(cluster, "w1")
    answer(cluster, "w2")
    assert list(plan(cluster).equipment.gpu_kinds) == [H100]


def test_workers_that_tell_their_gpus_later_keep_a_job_that_began_before(cluster: Any) -> None:
    cluster.aggregator()
    cluster.worker("w1", **gpu())
    cluster.submit(edit=on_gpus)
    assert not plan(cluster).equipment.gpu_kinds
    cluster.worker("w1", incarnation="w1-2", **gpu(H100))
    cluster.worker("w2", **gpu(H100))
    assert hosts(cluster) == ["w1", "w2"]


def test_a_job_of_an_earlier_version_takes_every_kind_and_looks_at_leaves(cluster: Any) -> None:
    by_hand(cluster)
    cluster.worker("w1", **NEW)
    cluster.worker("w2", **NEW)
    cluster.submit(edit=verified)
    answer(cluster, "w1")
    answer(cluster, "w2")
    for record in cluster.journal:
        if record.HasField("term_started"):
            record.term_started.plan.ClearField("equipment")
    cluster.lead()
    cluster.aggregator()
    for name, has in {"w1": NEW, "w2": NEW, "old": OLD}.items():
        cluster.worker(name, **has)
    cluster.advance(5.0)
    assert hosts(cluster) == ["old", "w1", "w2"]
    set_up(cluster, "old", OTHER)
    assert hosts(cluster) == ["w1", "w2"]
    assert not caught(cluster)


def test_who_comes_back_with_another_version_loses_the_job(cluster: Any) -> None:
    cluster.aggregator()
    for name in ("w1", "w2"):
        cluster.worker(name, **NEW)
    cluster.submit(edit=torch_job)
    held = pb.HeldWorkerJob(job_id="job-1", term=1, ready=True)
    held.train_nodes.add(first=0, span=1)
    cluster.worker("w1", held_jobs=[held], **OLD)  # replaced below the running process
    assert cluster.told("w1", "revoke_job")
    assert hosts(cluster) == ["w2"]
    assert excluded(cluster) == {"w1": OTHER_TORCH}


def test_nobody_of_the_kind_is_left_and_the_job_says_whom_it_waits_for(cluster: Any) -> None:
    cluster.aggregator()
    cluster.worker("w1", **NEW)
    cluster.submit(edit=torch_job)
    cluster.worker("old", **OLD)
    cluster.kill("w1")
    cluster.advance(5.0)
    view = cluster.job()
    assert view.reason == "WAITING_FOR_FINGERPRINT"
    assert f"old would give others (old: {OTHER_TORCH}); set" in view.message


def test_fall_back_goes_on_with_one_kind(cluster: Any) -> None:
    def fall_back(spec: JobSpec) -> None:
        torch_job(spec)
        spec.reproducibility.bitwise.fall_back_after.seconds = 30

    cluster.aggregator()
    cluster.worker("w1", slots=8, **NEW)
    cluster.submit(edit=fall_back)
    cluster.worker("x1", **OLD)
    cluster.worker("x2", **OLD)
    cluster.worker("x3", libraries={"torch": "2.11.0"})
    cluster.kill("w1")
    cluster.advance(29, tick_s=1.0)
    assert cluster.job().reason == "WAITING_FOR_FINGERPRINT"
    cluster.advance(3, tick_s=1.0)
    assert "BIT_IDENTITY_LOST" in cluster.types()
    assert hosts(cluster) == ["x1", "x2"]
    assert dict(plan(cluster).equipment.libraries) == {"torch": "2.12.0"}
    assert plan(cluster).fingerprint == "f"


def test_after_a_fall_back_of_an_earlier_version_every_kind_may_take_part(cluster: Any) -> None:
    cluster.aggregator()
    cluster.worker("w1", **NEW)
    cluster.submit(edit=torch_job)
    record = cluster.journal[-1].__class__()
    record.CopyFrom(cluster.journal[-1])
    record.ClearField("request")
    record.fingerprint_changed.job_id, record.fingerprint_changed.fingerprint = "job-1", "f"
    cluster.journal.append(record)
    cluster.lead()
    cluster.aggregator()
    cluster.worker("old", **OLD)
    cluster.advance(5.0)
    assert hosts(cluster) == ["old"]


def test_other_aggregators_do_not_change_the_kind_of_the_workers(cluster: Any) -> None:
    def fall_back(spec: JobSpec) -> None:
        torch_job(spec)
        spec.reproducibility.bitwise.fall_back_after.seconds = 30

    cluster.aggregator("a1")
    cluster.worker("w1", **NEW)
    cluster.submit(edit=fall_back)
    cluster.aggregator("a2", fingerprint="g")
    cluster.worker("old", **OLD)
    cluster.kill("a1")
    cluster.advance(40, tick_s=1.0)
    assert "BIT_IDENTITY_LOST" in cluster.types()
    assert hosts(cluster) == ["w1"]
    assert excluded(cluster) == {"old": OTHER_TORCH}


def test_a_kind_with_enough_workers_is_taken_before_a_larger_one(cluster: Any) -> None:
    by_hand(cluster)
    cluster.worker("large", slots=16, **OLD)
    for name in ("w1", "w2"):
        cluster.worker(name, **NEW)
    cluster.submit(edit=verified)
    assert asked(cluster) == ["w1", "w2"], "two have to agree"


def test_where_it_fails_on_one_kind_another_is_asked(cluster: Any) -> None:
    by_hand(cluster)
    cluster.worker("large", slots=16, **OLD)
    cluster.worker("w1", **NEW)
    cluster.submit(edit=torch_job)
    assert asked(cluster) == ["large"]
    failure = Failure(code="JOB_DATA", message="the disk is full", shard=-1)
    cluster.describe(cluster.sessions["large"], "job-1", failure=failure)
    assert asked(cluster) == ["w1"]
    answer(cluster, "w1")
    assert cluster.state() == "RUNNING"
    assert hosts(cluster) == ["w1"]


def test_members_of_an_all_reduce_are_of_one_kind(cluster: Any) -> None:
    def all_reduce(spec: JobSpec) -> None:
        torch_job(spec)
        spec.train.all_reduce.SetInParent()

    for name, has in {"old": OLD, "w1": NEW, "w2": NEW}.items():
        cluster.worker(name, address=f"127.0.0.1:{len(name)}", **has)
    cluster.submit(edit=all_reduce)
    assert cluster.state() == "RUNNING"
    cluster.advance(5.0)
    owners = {each.aggregator_id for each in cluster.core.facts.jobs["job-1"].ranges}
    assert owners == {"w1", "w2"}


@pytest.mark.parametrize("program", ["evaluate", "predict"])
def test_a_stored_model_is_put_through_one_version(cluster: Any, program: str) -> None:
    spec = JobSpec(name="score")
    spec.data.name, spec.data.shards = "digits", 4
    getattr(spec, program).model = "pictures@3"

    def with_torch(submitted: JobSubmitted) -> None:
        submitted.model_libraries.append("torch")

    cluster.aggregator()
    for name, has in {"old": OLD, "w1": NEW, "w2": NEW}.items():
        cluster.worker(name, **has)
    cluster.submit_spec(spec, DATASET, "job-1", change=with_torch)
    assert hosts(cluster) == ["w1", "w2"]
    assert excluded(cluster) == {"old": OTHER_TORCH}


def test_a_job_that_goes_on_from_another_keeps_its_kind(cluster: Any) -> None:
    cluster.aggregator()
    cluster.worker("w1", **NEW)
    cluster.submit(edit=torch_job)
    checkpoint = CheckpointManifest(job_id="job-1", step=1, range_count=1)
    checkpoint.root_state = b'{"elapsed_s": 1.0}'
    origin = origin_of(cluster.core.facts.jobs["job-1"], checkpoint)
    submitted = JobSubmitted(spec=cluster.core.facts.jobs["job-1"].spec, plan=plan(cluster))
    submitted.plan.ClearField("equipment")
    submitted.plan.ClearField("fingerprint")
    origin.take_over(submitted)
    assert submitted.plan.equipment == plan(cluster).equipment
    assert submitted.plan.fingerprint == "f"


def test_how_many_workers_could_run_a_job_counts_one_kind(cluster: Any) -> None:
    for name, has in {"w1": NEW, "w2": NEW, "old": OLD, "none": {}}.items():
        cluster.worker(name, **has)
    cluster.submit(edit=torch_job)
    submitted = cluster.core.facts.jobs["job-1"].kept.submitted
    assert count_eligible(cluster.core, submitted) == 2


def test_texts_of_any_length_are_kept_in_short(cluster: Any) -> None:
    cluster.aggregator()
    long = {"libraries": {"torch": "9" * 10_000}, "gpus": 2}
    cluster.worker("w1", gpu_kinds=[f"{number}" * 10_000 for number in range(100)], **long)
    cluster.submit(edit=on_gpus)
    assert hosts(cluster) == ["w1"]
    assert plan(cluster).equipment.ByteSize() < 8 * 1024


def test_what_one_worker_says_does_not_fill_the_answer_to_operators(cluster: Any) -> None:
    many = {"torch": "9" * 10_000, **{f"{number:06}" * 50: "1" for number in range(1000)}}
    cluster.worker("w1", libraries=many, gpus=2, gpu_kinds=[f"{n:06}" * 50 for n in range(1000)])
    view = worker_view(cluster.core, cluster.core.workers["w1"])
    assert view.ByteSize() < 32 * 1024
    assert view.libraries["torch"].startswith("999")


def test_operators_see_libraries_and_gpus(cluster: Any) -> None:
    cluster.worker("w1", **gpu(H100))
    view = worker_view(cluster.core, cluster.core.workers["w1"])
    assert dict(view.libraries) == {"torch": "2.13.0"}
    assert (view.gpus, list(view.gpu_kinds)) == (4, [H100])


def test_a_worker_that_replaces_itself_with_another_kind_is_another_one(cluster: Any) -> None:
    cluster.aggregator()
    cluster.worker("w1", **gpu(H100))
    cluster.submit(edit=on_gpus)
    cluster.feed(ev.Tick())
    held = pb.HeldWorkerJob(job_id="job-1", term=1, ready=True)
    cluster.worker("w1", held_jobs=[held], **gpu(A100))
    assert hosts(cluster) == []
    assert cluster.job().reason == "WAITING_FOR_FINGERPRINT"
