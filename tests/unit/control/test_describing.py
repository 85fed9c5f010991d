"""What a verified job is, and the leaf that everybody is measured by, is no one worker's word."""

from __future__ import annotations

from typing import Any

import pytest

from coordinator.control.core.state import CoreConfig
from phalanx.v1 import coordination_service_pb2 as pb
from phalanx.v1.cluster_service_pb2 import Worker
from phalanx.v1.job_pb2 import Failure
from phalanx.v1.training_pb2 import Layout, TensorSpec

RIGHT, OTHER = "aa" * 32, "bb" * 32
SUMS = ["loss", "correct"]


def layout(rows: int = 64) -> Layout:
    tensor = TensorSpec(name="w", shape=[rows, 10], decay=True)
    return Layout(tensors=[tensor], dtype="float32", element_count=10 * rows)


def replicas(count: int) -> Any:
    def edit(spec: Any) -> None:
        spec.train.verification.replicas = count

    return edit


def submit(cluster: Any, *names: str, count: int = 3) -> None:
    """Submit job-1, whose replicas are compared, to these workers; they answer when told to."""
    cluster.auto = False
    cluster.aggregator()
    for name in names:
        cluster.worker(name)
    cluster.submit(edit=replicas(count))


def answer(cluster: Any, name: str, leaf_sha256: str = RIGHT, **found: Any) -> None:
    if "failure" not in found:
        found = {"layout": layout(), "evaluation_sums": SUMS, "leaf_sha256": leaf_sha256, **found}
    cluster.describe(cluster.sessions[name], "job-1", **found)


def asked(cluster: Any) -> list[str]:
    return sorted(cluster.core.jobs["job-1"].describing)


def leaf(cluster: Any) -> str:
    return str(cluster.core.facts.jobs["job-1"].leaf_sha256)


def quarantines(cluster: Any) -> list[Any]:
    return [each for each in cluster.events if each.type == "WORKER_QUARANTINED"]


def caught(cluster: Any) -> list[str]:
    return [each.worker_id for each in quarantines(cluster)]


def test_two_that_agree_are_believed_and_nobody_else_is_asked(cluster: Any) -> None:
    submit(cluster, "w1", "w2", "w3")
    assert asked(cluster) == ["w1", "w2"]
    answer(cluster, "w1")
    assert (cluster.state(), cluster.job().reason) == ("QUEUED", "DESCRIBING")
    answer(cluster, "w2")
    assert (cluster.state(), leaf(cluster)) == ("RUNNING", RIGHT)
    assert not cluster.told("w3", "describe_job")
    assert not caught(cluster)


@pytest.mark.parametrize("liar", ["w1", "w2"])
def test_a_liar_among_the_first_is_outvoted_and_quarantined(cluster: Any, liar: str) -> None:
    submit(cluster, "w1", "w2", "w3")
    for name in ("w1", "w2"):
        answer(cluster, name, OTHER if name == liar else RIGHT)
    assert cluster.state() == "QUEUED"
    assert asked(cluster) == ["w3"]
    answer(cluster, "w3")
    assert (cluster.state(), leaf(cluster)) == ("RUNNING", RIGHT)
    [event] = quarantines(cluster)
    assert (event.worker_id, event.job_id, event.shard, event.step) == (liar, "job-1", 0, 0)
    assert event.details["sha256"] == OTHER
    assert event.details["majority_sha256"] == RIGHT
    honest = sorted({"w1", "w2", "w3"} - {liar})
    assert event.details["agreed"] == ",".join(honest)
    assert cluster.core.workers[liar].state == Worker.STATE_QUARANTINED
    assert sorted(cluster.core.jobs["job-1"].hosts) == honest


def test_two_of_five_that_say_the_same_are_outvoted_by_three(cluster: Any) -> None:
    submit(cluster, "w1", "w2", "w3", "w4", "w5", count=5)
    assert asked(cluster) == ["w1", "w2", "w3"]
    for name in ("w1", "w2"):
        answer(cluster, name, OTHER)
    answer(cluster, "w3")
    assert asked(cluster) == ["w4"]
    answer(cluster, "w4")
    assert asked(cluster) == ["w5"]
    answer(cluster, "w5")
    assert (cluster.state(), leaf(cluster)) == ("RUNNING", RIGHT)
    assert caught(cluster) == ["w1", "w2"]


def set_up(cluster: Any, name: str, leaf_sha256: str) -> None:
    """A worker has set the job up, and tells its own leaf."""
    ready = pb.WorkerJobReady(job_id="job-1", term=1, leaf_sha256=leaf_sha256)
    cluster.say(cluster.sessions[name], worker_job_ready=ready)


def test_a_liar_that_nobody_asked_is_quarantined_once_it_sets_the_job_up(cluster: Any) -> None:
    submit(cluster, "w1", "w2", "w3")
    answer(cluster, "w1")
    answer(cluster, "w2")
    set_up(cluster, "w1", RIGHT)
    set_up(cluster, "w3", OTHER)
    set_up(cluster, "w3", OTHER)
    [event] = quarantines(cluster)
    assert (event.worker_id, event.job_id, event.shard, event.step) == ("w3", "job-1", 0, 0)
    assert event.details["sha256"] == OTHER
    assert event.details["majority_sha256"] == RIGHT
    assert cluster.core.workers["w3"].state == Worker.STATE_QUARANTINED
    assert sorted(cluster.core.jobs["job-1"].hosts) == ["w1", "w2"]


def test_a_liar_that_comes_back_to_another_leader_with_the_job_is_quarantined(cluster: Any) -> None:
    submit(cluster, "w1", "w2")
    answer(cluster, "w1")
    answer(cluster, "w2")
    cluster.lead()
    held = pb.HeldWorkerJob(job_id="job-1", term=1, ready=True, leaf_sha256=OTHER)
    cluster.worker("w3", held_jobs=[held])
    assert caught(cluster) == ["w3"]
    assert cluster.told("w3", "revoke_job")


def test_of_a_job_that_one_worker_described_another_leaf_is_no_lie(cluster: Any) -> None:
    cluster.auto = False
    cluster.aggregator()
    for name in ("w1", "w2"):
        cluster.worker(name)
    cluster.submit()
    answer(cluster, "w1")
    set_up(cluster, "w2", OTHER)
    assert not caught(cluster)
    assert sorted(cluster.core.jobs["job-1"].hosts) == ["w1"]


def test_liars_of_different_minds_need_not_be_few(cluster: Any) -> None:
    submit(cluster, "w1", "w2", "w3", "w4", "w5")
    for number, name in enumerate(("w1", "w2", "w3")):
        answer(cluster, name, f"{number}b" * 32)
    answer(cluster, "w4")
    answer(cluster, "w5")
    assert (cluster.state(), leaf(cluster)) == ("RUNNING", RIGHT)
    assert caught(cluster) == ["w1", "w2", "w3"]


@pytest.mark.parametrize("lie", [{"layout": layout(65)}, {"evaluation_sums": ["loss"]}])
def test_layout_and_sums_are_compared_as_well(cluster: Any, lie: dict[str, Any]) -> None:
    submit(cluster, "w1", "w2", "w3")
    answer(cluster, "w1", **lie)
    answer(cluster, "w2")
    answer(cluster, "w3")
    plan = cluster.core.facts.jobs["job-1"].plan
    assert (plan.layout, list(plan.evaluation_sums)) == (layout(), SUMS)
    [event] = quarantines(cluster)
    assert event.worker_id == "w1"
    assert event.details["sha256"] != event.details["majority_sha256"]


def test_it_is_told_only_once_it_is_durable(cluster: Any) -> None:
    submit(cluster, "w1", "w2", "w3")
    answer(cluster, "w1", OTHER)
    answer(cluster, "w2")
    cluster.storage_up = False
    answer(cluster, "w3")
    assert not caught(cluster)
    cluster.storage_up = True
    cluster.perform()
    assert caught(cluster) == ["w1"]


def test_it_waits_for_workers_that_join_later_and_says_for_whom(cluster: Any) -> None:
    submit(cluster, "w1")
    answer(cluster, "w1", OTHER)
    job = cluster.job()
    assert (cluster.state(), job.reason) == ("QUEUED", "WAITING_FOR_VERIFIERS")
    assert "2 workers have to agree" in job.message
    assert "1 description of it came, from w1" in job.message
    assert "add workers" in job.message
    cluster.worker("w2")
    assert cluster.job().reason == "DESCRIBING"
    answer(cluster, "w2")
    assert cluster.job().reason == "WAITING_FOR_VERIFIERS"
    assert "from w1, w2, with 2 different results" in cluster.job().message
    waits = [each for each in cluster.events if each.type == "JOB_WAITING"]
    assert [each.details["reason"] for each in waits] == ["WAITING_FOR_VERIFIERS"] * 2
    cluster.worker("w3")
    answer(cluster, "w3")
    assert (cluster.state(), leaf(cluster), caught(cluster)) == ("RUNNING", RIGHT, ["w1"])


def test_results_that_all_differ_hint_at_the_code(cluster: Any) -> None:
    submit(cluster, "w1", "w2", "w3")
    for number, name in enumerate(("w1", "w2", "w3")):
        answer(cluster, name, f"{number}c" * 32)
    assert cluster.job().reason == "WAITING_FOR_VERIFIERS"
    assert "3 different results" in cluster.job().message
    assert "more than its seed" in cluster.job().message
    assert not caught(cluster)


def test_another_leader_asks_again_and_comes_to_the_same(cluster: Any) -> None:
    submit(cluster, "w1", "w2", "w3")
    answer(cluster, "w1", OTHER)
    answer(cluster, "w2")
    cluster.lead()
    cluster.aggregator()
    cluster.worker("w1")
    assert asked(cluster) == ["w1"]
    answer(cluster, "w1", OTHER)
    assert cluster.job().reason == "WAITING_FOR_VERIFIERS"
    for name in ("w2", "w3"):
        cluster.worker(name)
        answer(cluster, name)
    assert (cluster.state(), leaf(cluster), caught(cluster)) == ("RUNNING", RIGHT, ["w1"])


def test_what_was_agreed_on_is_not_asked_for_again(cluster: Any) -> None:
    submit(cluster, "w1", "w2", "w3")
    answer(cluster, "w1", OTHER)
    answer(cluster, "w2")
    answer(cluster, "w3")
    cluster.lead()
    for name in ("w1", "w2", "w3"):
        cluster.worker(name)
    assert leaf(cluster) == RIGHT
    assert not any(cluster.told(name, "describe_job") for name in ("w1", "w2", "w3"))
    assert cluster.core.workers["w1"].state == Worker.STATE_QUARANTINED


def test_an_answer_of_a_worker_that_died_counts_and_one_that_began_anew_is_asked_anew(
    cluster: Any,
) -> None:
    submit(cluster, "w1", "w2")
    answer(cluster, "w1")
    cluster.kill("w2")
    assert cluster.job().reason == "WAITING_FOR_VERIFIERS"
    cluster.worker("w2", incarnation="w2-2")
    cluster.worker("w1", incarnation="w1-2")
    assert asked(cluster) == ["w1", "w2"]
    answer(cluster, "w1")
    answer(cluster, "w2")
    assert (cluster.state(), caught(cluster)) == ("RUNNING", [])
    assert cluster.core.jobs["job-1"].descriptions == {}


def test_of_a_liar_that_has_left_no_later_start_is_blamed(cluster: Any) -> None:
    submit(cluster, "w1", "w2", "w3")
    answer(cluster, "w1", OTHER)
    cluster.kill("w1")
    answer(cluster, "w2")
    answer(cluster, "w3")
    assert caught(cluster) == ["w1"], "that start may come back"
    cluster.worker("w1")
    assert cluster.core.workers["w1"].state == Worker.STATE_QUARANTINED
    cluster.kill("w1")
    cluster.worker("w1", incarnation="w1-2")
    assert cluster.core.workers["w1"].state == Worker.STATE_READY


def test_what_a_quarantined_worker_has_said_counts_no_more(cluster: Any) -> None:
    cluster.aggregator()
    for name in ("w1", "w2"):
        cluster.worker(name)
    cluster.submit("job-0")
    cluster.auto = False
    cluster.submit(edit=replicas(3))
    answer(cluster, "w1", OTHER)
    message = pb.OutvotedWorker(worker_id="w1", incarnation="w1-1", sha256=OTHER, agreed=["w2"])
    cluster.report("job-0", 7, outvoted_workers=[message])
    answer(cluster, "w2", OTHER)
    assert cluster.job().reason == "WAITING_FOR_VERIFIERS"
    assert "w1 is quarantined" in cluster.job().message
    for name in ("w3", "w4"):
        cluster.worker(name)
        answer(cluster, name)
    assert (cluster.state(), leaf(cluster), caught(cluster)) == ("RUNNING", RIGHT, ["w1", "w2"])


def failure(message: str = "boom") -> dict[str, Any]:
    return {"failure": Failure(code="BROKEN_MODEL", message=message, shard=-1)}


def test_code_that_raises_fails_the_job_once_as_many_say_so(cluster: Any) -> None:
    submit(cluster, "w1", "w2", "w3")
    answer(cluster, "w1", **failure("boom at 0x1"))
    assert cluster.state() == "QUEUED"
    answer(cluster, "w2", **failure("boom at 0x2"))
    assert (cluster.state(), cluster.job().reason) == ("FAILED", "BROKEN_MODEL")
    assert cluster.job().message == "boom at 0x1"
    assert not caught(cluster)


def test_one_that_says_it_fails_neither_fails_the_job_nor_is_taken_for_a_liar(
    cluster: Any,
) -> None:
    submit(cluster, "w1", "w2", "w3")
    answer(cluster, "w1", **failure())
    answer(cluster, "w2")
    answer(cluster, "w3")
    assert (cluster.state(), leaf(cluster), caught(cluster)) == ("RUNNING", RIGHT, [])


def test_one_that_says_it_succeeds_is_no_liar_if_others_fail(cluster: Any) -> None:
    submit(cluster, "w1", "w2", "w3")
    answer(cluster, "w1")
    for name in ("w2", "w3"):
        answer(cluster, name, **failure())
    assert (cluster.state(), caught(cluster)) == ("FAILED", [])


def test_a_failure_that_nobody_confirms_is_told_while_the_job_waits(cluster: Any) -> None:
    submit(cluster, "w1")
    answer(cluster, "w1", **failure())
    assert cluster.job().reason == "WAITING_FOR_VERIFIERS"
    assert "it fails on w1: boom" in cluster.job().message


def test_a_model_without_parameters_fails_the_job_if_they_agree(cluster: Any) -> None:
    submit(cluster, "w1", "w2")
    for name in ("w1", "w2"):
        answer(cluster, name, layout=Layout(dtype="float32"))
    assert (cluster.state(), cluster.job().reason) == ("FAILED", "DESCRIBE_FAILED")


def test_bits_are_compared_within_a_fingerprint_only(cluster: Any) -> None:
    submit(cluster, "w1", "w2")
    answer(cluster, "w1", OTHER)
    cluster.kill("w2")
    for name in ("x1", "x2", "x3"):
        cluster.worker(name, fingerprint="another")
    answer(cluster, asked(cluster)[0])
    answer(cluster, asked(cluster)[0])
    facts = cluster.core.facts.jobs["job-1"]
    assert (facts.leaf_sha256, facts.fingerprint) == (RIGHT, "another")
    assert not caught(cluster)


def test_nobody_is_waited_for_who_cannot_take_part(cluster: Any) -> None:
    submit(cluster, "w1", "w2")
    for name in ("x1", "x2", "x3"):
        cluster.worker(name, fingerprint="another")
    assert asked(cluster) == ["w1", "w2", "x1", "x2"]
    cluster.say(cluster.sessions["x1"], drain_requested=pb.DrainRequested())
    cluster.worker("x4", fingerprint="another")
    assert asked(cluster) == ["w1", "w2", "x1", "x2", "x3"]


@pytest.fixture
def impatient(make_cluster: Any) -> Any:
    return make_cluster(config=CoreConfig(describe_timeout_s=5.0))


def test_one_that_never_answers_is_asked_again_only_if_there_is_nobody_else(
    impatient: Any,
) -> None:
    submit(impatient, "w1", "w2", "w3")
    answer(impatient, "w2")
    impatient.advance(5.5)
    assert asked(impatient) == ["w3"]
    answer(impatient, "w3")
    assert impatient.state() == "RUNNING"


def test_one_that_never_answers_cannot_fail_the_job(impatient: Any) -> None:
    submit(impatient, "w1", "w2")
    answer(impatient, "w2")
    impatient.advance(40.0)
    assert (impatient.state(), asked(impatient)) == ("QUEUED", ["w1"])
    impatient.worker("w3")
    impatient.advance(5.5)
    answer(impatient, "w3")
    assert impatient.state() == "RUNNING"


def test_code_that_hangs_fails_the_job_once_as_many_hang(impatient: Any) -> None:
    submit(impatient, "w1", "w2", "w3")
    impatient.advance(12.0)
    assert (impatient.state(), impatient.job().reason) == ("FAILED", "DESCRIBE_TIMEOUT")


def test_an_audit_begins_with_two_that_agree(cluster: Any) -> None:
    cluster.auto = False
    cluster.aggregator()
    for name in ("w1", "w2", "w3"):
        cluster.worker(name)

    def edit(spec: Any) -> None:
        spec.train.verification.audit_fraction = 0.1

    cluster.submit(edit=edit)
    answer(cluster, "w1", OTHER)
    answer(cluster, "w2")
    answer(cluster, "w3")
    assert (cluster.state(), leaf(cluster), caught(cluster)) == ("RUNNING", RIGHT, ["w1"])


def test_without_verification_one_is_believed(cluster: Any) -> None:
    cluster.auto = False
    cluster.aggregator()
    for name in ("w1", "w2", "w3"):
        cluster.worker(name)
    cluster.submit()
    assert asked(cluster) == ["w1"]
    answer(cluster, "w1", OTHER)
    assert (cluster.state(), leaf(cluster)) == ("RUNNING", OTHER)


def test_one_that_drains_leaves_once_it_has_answered(cluster: Any) -> None:
    submit(cluster, "w1", "w2", "w3")
    cluster.say(cluster.sessions["w1"], drain_requested=pb.DrainRequested())
    assert not cluster.told("w1", "drain")
    answer(cluster, "w1")
    cluster.advance(0.5)
    assert cluster.told("w1", "drain")


def unverified(cluster: Any, *names: str) -> None:
    cluster.auto = False
    cluster.aggregator()
    for name in names:
        cluster.worker(name)
    cluster.submit()


def test_another_is_asked_besides_one_whose_leaf_may_hang(cluster: Any) -> None:
    unverified(cluster, "w1", "w2", "w3")
    cluster.advance(9.0)
    assert asked(cluster) == ["w1"]
    cluster.advance(2.0)
    assert asked(cluster) == ["w1", "w2"]
    answer(cluster, "w2")
    assert (cluster.state(), leaf(cluster), asked(cluster)) == ("RUNNING", RIGHT, [])
    answer(cluster, "w1", OTHER)
    assert leaf(cluster) == RIGHT, "whoever comes second is not listened to"


def test_code_that_hangs_takes_two_workers_at_most(cluster: Any) -> None:
    unverified(cluster, "w1", "w2", "w3", "w4")
    cluster.advance(200.0)
    assert asked(cluster) == ["w1", "w2"]
    cluster.advance(700.0)
    assert (cluster.state(), cluster.job().reason) == ("FAILED", "DESCRIBE_TIMEOUT")


def test_a_lonely_worker_may_take_its_time(cluster: Any) -> None:
    unverified(cluster, "w1")
    cluster.advance(250.0)
    assert asked(cluster) == ["w1"]
    answer(cluster, "w1")
    assert cluster.state() == "RUNNING"


def test_a_verified_job_does_not_wait_for_one_whose_leaf_may_hang(cluster: Any) -> None:
    submit(cluster, "w1", "w2", "w3", "w4", "w5", "w6")
    answer(cluster, "w2")
    cluster.advance(11.0)
    assert asked(cluster) == ["w1", "w3"]
    answer(cluster, "w3")
    assert (cluster.state(), leaf(cluster)) == ("RUNNING", RIGHT)


def test_verified_code_that_hangs_takes_twice_as_many_as_it_needs(cluster: Any) -> None:
    submit(cluster, "w1", "w2", "w3", "w4", "w5", "w6")
    cluster.advance(200.0)
    assert asked(cluster) == ["w1", "w2", "w3", "w4"]


FULL = Failure(code="JOB_DATA", message="no space left on device")


def ineligible(cluster: Any) -> list[str]:
    return [each.worker_id for each in cluster.events if each.type == "WORKER_INELIGIBLE"]


def test_one_that_cannot_build_the_model_fails_no_job_that_another_can(cluster: Any) -> None:
    unverified(cluster, "w1", "w2", "w3")
    answer(cluster, "w1", failure=FULL)
    assert (cluster.state(), asked(cluster)) == ("QUEUED", ["w2"])
    [told] = [each for each in cluster.events if each.type == "WORKER_INELIGIBLE"]
    assert (told.worker_id, told.job_id) == ("w1", "job-1")
    assert "no space left on device" in told.message
    answer(cluster, "w2")
    assert (cluster.state(), leaf(cluster)) == ("RUNNING", RIGHT)


def test_code_that_three_cannot_build_fails_the_job_and_says_on_whom(cluster: Any) -> None:
    unverified(cluster, "w1", "w2", "w3", "w4")
    for name in ("w1", "w2", "w3"):
        assert cluster.state() == "QUEUED"
        answer(cluster, name, failure=Failure(code="JOB_CODE", message="no module named x"))
    job = cluster.job()
    assert (cluster.state(), job.reason) == ("FAILED", "JOB_CODE")
    assert job.message == "no module named x (it failed on w1, w2, w3)"
    assert [list(each.worker_ids) for each in job.failures] == [["w1"], ["w2"], ["w3"]]
    assert ineligible(cluster) == ["w1", "w2"], "the third was the last word"


@pytest.mark.parametrize("names", [("w1",), ("w1", "w2")])
def test_where_nobody_else_is_there_the_job_fails_at_once(
    cluster: Any, names: tuple[str, ...]
) -> None:
    unverified(cluster, *names)
    for name in names:
        answer(cluster, name, failure=FULL)
    assert (cluster.state(), cluster.job().reason) == ("FAILED", "JOB_DATA")


def test_one_that_was_started_anew_is_asked_again(cluster: Any) -> None:
    unverified(cluster, "w1", "w2")
    answer(cluster, "w1", failure=FULL)
    cluster.kill("w1")
    cluster.worker("w1", incarnation="again")
    answer(cluster, "w2", failure=FULL)
    assert (cluster.state(), asked(cluster)) == ("QUEUED", ["w1"])
    answer(cluster, "w1")
    assert cluster.state() == "RUNNING"


@pytest.mark.parametrize(
    "fields",
    [
        {"layout": Layout(tensors=[TensorSpec(name="t" * 100)] * 20_000, element_count=5)},
        {"layout": Layout(element_count=5), "evaluation_sums": ["s" * 2_000_000]},
        {"layout": Layout(element_count=5), "leaf_sha256": "f" * 2_000_000},
    ],
    ids=["tensors", "sums", "leaf"],
)
def test_a_description_that_is_too_long_is_not_kept(cluster: Any, fields: dict[str, Any]) -> None:
    """One bad worker would fill memory and journal: each term of the job repeats its layout."""
    cluster.auto = False
    cluster.aggregator()
    sessions = {name: cluster.worker(name) for name in ("w1", "w2")}
    cluster.submit()
    bad = next(name for name in sessions if cluster.told(name, "describe_job"))
    cluster.describe(sessions[bad], "job-1", **fields)
    kept = cluster.core.jobs["job-1"].undescribed[bad]
    assert (kept.code, kept.ByteSize() < 1024) == ("DESCRIPTION_TOO_LONG", True)
    assert "at most 1,048,576 are taken" in kept.message
    cluster.describe(sessions[({"w1", "w2"} - {bad}).pop()], "job-1")
    assert cluster.state() == "RUNNING"


def test_what_failed_where_a_job_was_described_is_kept_in_short(cluster: Any) -> None:
    cluster.auto = False
    cluster.aggregator()
    sessions = {name: cluster.worker(name) for name in ("w1", "w2")}
    cluster.submit()
    bad = next(name for name in sessions if cluster.told(name, "describe_job"))
    failed = Failure(code="JOB_CODE", message="m" * 1_000_000, traceback="t" * 1_000_000)
    cluster.describe(sessions[bad], "job-1", failure=failed)
    assert cluster.core.jobs["job-1"].undescribed[bad].ByteSize() < 64 * 1024
