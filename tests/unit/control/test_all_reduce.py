"""Jobs whose workers own the parameters: members of a term, and when another one begins."""

from __future__ import annotations

from typing import Any

import pytest

from coordinator.control.core import events as ev
from coordinator.control.core.tree import node_count
from phalanx.v1 import coordination_service_pb2 as pb
from phalanx.v1 import storage_service_pb2
from phalanx.v1.cluster_service_pb2 import Worker
from phalanx.v1.job_spec_pb2 import JobSpec


def all_reduce(spec: JobSpec) -> None:
    spec.train.all_reduce.SetInParent()


def join(cluster: Any, name: str, slots: int = 1) -> int:
    return cluster.worker(name, slots=slots, address=f"127.0.0.1:{len(cluster.sessions) + 9000}")


@pytest.fixture
def reducing(cluster: Any) -> Any:
    """Three workers and a job that runs on them, without any aggregator."""
    for name in ("w1", "w2", "w3"):
        join(cluster, name)
    cluster.submit(edit=all_reduce)
    assert cluster.state() == "RUNNING"
    return cluster


def members(cluster: Any) -> list[str]:
    return [each.aggregator_id for each in cluster.core.facts.jobs["job-1"].ranges]


def term(cluster: Any) -> int:
    return cluster.core.facts.jobs["job-1"].term


def covered(cluster: Any) -> None:
    """Every shard is at exactly one member, and every member has one."""
    held = [cluster.shards(name) for name in members(cluster)]
    assert all(held)
    assert sorted(shard for shards in held for shard in shards) == list(range(16))


def test_workers_own_the_ranges_and_hold_the_shards(reducing: Any) -> None:
    assert members(reducing) == ["w1", "w2", "w3"]
    assert term(reducing) == 1
    covered(reducing)
    told = reducing.told("w2", "assign_job")[-1]
    assert [each.address for each in told.ranges] == [
        reducing.core.workers[name].hello.address for name in members(reducing)
    ]
    # One block of parameters: the first owns it, the others hold copies and own nothing.
    assert [each.element_count for each in told.ranges] == [640, 0, 0]


def test_a_death_makes_a_term_of_those_that_are_left_and_rolls_nothing_back(reducing: Any) -> None:
    reducing.report("job-1", 7, owner="w1")
    reducing.kill("w1")
    assert (term(reducing), members(reducing)) == (2, ["w2", "w3"])
    covered(reducing)
    assert "STEPS_REPLAYED" not in reducing.types()
    moved = next(event for event in reducing.events if event.type == "SHARDS_MOVED")
    assert (moved.details["cause"], moved.details["remaining"]) == ("members", "w2,w3")
    reducing.time_s += 1
    reducing.report("job-1", 8, owner="w2")
    assert "RECOVERED" in reducing.types()


def test_a_joiner_is_a_member_once_it_is_ready(reducing: Any) -> None:
    reducing.auto = False
    session = join(reducing, "w4")
    assert (term(reducing), members(reducing)) == (1, ["w1", "w2", "w3"])
    assert reducing.shards("w4") == set()
    reducing.say(session, worker_job_ready=pb.WorkerJobReady(job_id="job-1", term=1))
    assert term(reducing) == 2
    assert sorted(members(reducing)) == ["w1", "w2", "w3", "w4"]
    covered(reducing)


def test_spare_workers_do_not_take_turns(cluster: Any) -> None:
    """With few shards some workers get none; a term in which others get none is no better."""
    for number in range(7):
        join(cluster, f"w{number}")

    def five(spec: JobSpec) -> None:
        all_reduce(spec)
        spec.data.shards = 5

    cluster.submit(edit=five)
    before = term(cluster)
    assert len(members(cluster)) == 5
    cluster.advance(3.0)
    assert term(cluster) == before


@pytest.mark.parametrize("workers", [4, 5, 6, 7, 8])
def test_all_workers_take_part_as_long_as_there_are_shards_and_each_has_one_sub_tree(
    cluster: Any, workers: int
) -> None:
    names = [f"w{number}" for number in range(workers)]
    for name in names:
        join(cluster, name)

    def eight(spec: JobSpec) -> None:
        all_reduce(spec)
        spec.data.shards = 8

    cluster.submit(edit=eight)
    assert sorted(members(cluster)) == names
    assert all(node_count(cluster.shards(name), 8) == 1 for name in names)
    cluster.kill("w0")
    assert sorted(members(cluster)) == names[1:]


def test_one_that_was_started_again_is_no_member_before_it_is_ready(reducing: Any) -> None:
    reducing.auto, reducing.storage_up = False, False
    reducing.kill("w3")
    session = join(reducing, "w3")
    reducing.storage_up = True
    reducing.perform()
    reducing.run_operations()
    assert members(reducing) == ["w1", "w2"]
    reducing.say(session, worker_job_ready=pb.WorkerJobReady(job_id="job-1", term=term(reducing)))
    assert sorted(members(reducing)) == ["w1", "w2", "w3"]


def test_with_all_members_dead_the_next_ones_get_the_checkpoint(reducing: Any) -> None:
    manifest = storage_service_pb2.CheckpointManifest(step=5, manifest_sha256="ab" * 32)
    reducing.checkpoints["job-1"] = [manifest]
    reducing.report("job-1", 7, owner="w1", checkpoint_step=5)
    for name in ("w1", "w2", "w3"):
        reducing.kill(name)
    assert reducing.job().reason == "WAITING_FOR_WORKERS"
    join(reducing, "w9")
    assert members(reducing) == ["w9"]
    told = reducing.told("w9", "assign_job")[-1]
    assert (told.restore.step, told.reached_step) == (5, 7)
    replayed = next(event for event in reducing.events if event.type == "STEPS_REPLAYED")
    assert replayed.step == 5
    failure = pb.RangesReady(job_id="job-1", term=term(reducing))
    failure.failure.code = "DATA_LOSS"
    reducing.say(reducing.sessions["w9"], ranges_ready=failure)
    assert "CHECKPOINT_CORRUPT" in reducing.types()
    assert not reducing.told("w9", "assign_job")[-1].HasField("restore")


@pytest.mark.parametrize(("reported", "saved"), [(7, 5), (7, 7), (7, 9), (0, 0)])
def test_who_loses_all_members_is_told_whatever_the_root_said_last(
    reducing: Any, reported: int, saved: int
) -> None:
    """Steps were done, and checkpoints written, since the last report: those come now and then."""
    if reported:
        reducing.report("job-1", reported, owner="w1")
    if saved:
        manifest = storage_service_pb2.CheckpointManifest(step=saved, manifest_sha256="ab" * 32)
        reducing.checkpoints["job-1"] = [manifest]
    for name in ("w1", "w3", "w2"):
        reducing.kill(name)
        reducing.time_s += 0.001
    join(reducing, "w1")
    (replayed,) = (event for event in reducing.events if event.type == "STEPS_REPLAYED")
    assert (replayed.step, replayed.details["steps"]) == (saved, str(max(0, reported - saved)))
    lost = [event for event in reducing.events if event.type == "WORKER_LOST"]
    assert replayed.incident_id == lost[-1].incident_id
    moved = [each for each in reducing.observed if each.metric == "recovery_seconds"]
    assert ("phase", "redispatch") in moved[-1].labels, "the move belongs to the losses"


def test_control_that_is_new_adopts_the_members(reducing: Any) -> None:
    held = {
        name: pb.HeldWorkerJob(
            job_id="job-1",
            term=1,
            placement=1,
            train_nodes=reducing.told(name, "assign_job")[-1].train_nodes,
            evaluation_nodes=reducing.told(name, "assign_job")[-1].evaluation_nodes,
            ready=True,
        )
        for name in members(reducing)
    }
    reducing.lead()
    for name, job in held.items():
        reducing.worker(name, slots=1, address="127.0.0.1:9", held_jobs=[job])
    reducing.advance(5.0)
    assert (term(reducing), members(reducing)) == (1, ["w1", "w2", "w3"])
    reducing.kill("w2")
    assert (term(reducing), members(reducing)) == (2, ["w1", "w3"])


def test_the_last_member_leaves_if_it_is_drained_while_it_is_adopted(cluster: Any) -> None:
    """It was started again, so it holds nothing, and nobody will take its place."""
    join(cluster, "w1")
    cluster.submit(edit=all_reduce)
    cluster.lead()
    session = join(cluster, "w1")
    cluster.call(ev.DrainWorker, "w1")
    cluster.advance(cluster.core.lease_ttl_s() + 0.5)
    assert cluster.job().reason == "WAITING_FOR_WORKERS"
    assert cluster.told("w1", "drain")
    cluster.feed(ev.SessionBroken(session, "it left"))
    join(cluster, "w2")
    assert (term(cluster), members(cluster)) == (2, ["w2"])


def test_all_members_leave_if_all_are_drained_and_who_comes_gets_the_checkpoint(
    reducing: Any,
) -> None:
    manifest = storage_service_pb2.CheckpointManifest(step=5, manifest_sha256="ab" * 32)
    reducing.checkpoints["job-1"] = [manifest]
    reducing.report("job-1", 7, owner="w1", checkpoint_step=5)
    for name in ("w1", "w2", "w3"):
        reducing.call(ev.DrainWorker, name)
        assert reducing.told(name, "drain")
    assert (term(reducing), members(reducing)) == (3, ["w3"])
    assert reducing.job().reason == "WAITING_FOR_WORKERS"
    join(reducing, "w4")
    assert members(reducing) == ["w4"]
    told = reducing.told("w4", "assign_job")[-1]
    assert (told.restore.step, told.reached_step) == (5, 7)
    (replayed,) = (event for event in reducing.events if event.type == "STEPS_REPLAYED")
    assert (replayed.step, replayed.details["steps"]) == (5, "2")


def test_who_is_drained_alone_stays_as_long_as_others_may_be_adopted(reducing: Any) -> None:
    """Nobody else is there yet, and what it holds is needed until the next term."""
    held = {
        name: pb.HeldWorkerJob(
            job_id="job-1",
            term=1,
            train_nodes=reducing.told(name, "assign_job")[-1].train_nodes,
            evaluation_nodes=reducing.told(name, "assign_job")[-1].evaluation_nodes,
            ready=True,
        )
        for name in ("w1", "w2")
    }
    reducing.lead()
    reducing.worker("w1", slots=1, address="127.0.0.1:9", held_jobs=[held["w1"]])
    reducing.call(ev.DrainWorker, "w1")
    assert not reducing.told("w1", "revoke_job")
    reducing.worker("w2", slots=1, address="127.0.0.1:8", held_jobs=[held["w2"]])
    reducing.advance(reducing.core.lease_ttl_s() + 0.5)
    assert (term(reducing), members(reducing)) == (2, ["w2"])
    assert reducing.told("w1", "drain")
    assert "STEPS_REPLAYED" not in reducing.types()


def test_the_last_member_stays_while_another_one_is_only_silent(reducing: Any) -> None:
    reducing.storage_up = False
    reducing.kill("w3")
    reducing.time_s += 0.6 * reducing.core.lease_ttl_s()
    reducing.heartbeats("w1")
    reducing.feed(ev.Tick())
    assert reducing.core.workers["w2"].state == Worker.STATE_SUSPECTED
    reducing.say(reducing.sessions["w1"], drain_requested=pb.DrainRequested())
    assert not reducing.told("w1", "revoke_job")
    reducing.storage_up = True
    reducing.perform()
    reducing.run_operations()
    assert members(reducing) == ["w2"]
    assert reducing.told("w1", "drain")


@pytest.mark.parametrize("how", ["dies", "is drained"])
def test_one_that_others_cannot_reach_takes_nothing_over(cluster: Any, how: str) -> None:
    join(cluster, "w1")
    cluster.worker("old", slots=1)
    cluster.submit(edit=all_reduce)
    if how == "dies":
        cluster.kill("w1")
    else:
        cluster.call(ev.DrainWorker, "w1")
        assert cluster.told("w1", "drain")
    cluster.advance(3.0)
    assert cluster.job().reason == "WAITING_FOR_WORKERS"
    join(cluster, "w2")
    assert members(cluster) == ["w2"]


def test_what_only_a_drained_member_held_is_computed_again_and_told(cluster: Any) -> None:
    """Who prepares knows nothing yet, so what is done since the checkpoint is done again."""
    join(cluster, "w1")
    cluster.submit(edit=all_reduce)
    manifest = storage_service_pb2.CheckpointManifest(step=5, manifest_sha256="ab" * 32)
    cluster.checkpoints["job-1"] = [manifest]
    cluster.report("job-1", 7, owner="w1", checkpoint_step=5)
    cluster.auto = False
    join(cluster, "w2")
    assert members(cluster) == ["w1"]
    cluster.call(ev.DrainWorker, "w1")
    assert members(cluster) == ["w2"]
    assert cluster.told("w2", "assign_job")[-1].restore.step == 5
    (replayed,) = (event for event in cluster.events if event.type == "STEPS_REPLAYED")
    assert (replayed.step, replayed.details["steps"]) == (5, "2")


def test_a_pause_is_told_to_the_worker_that_is_the_root(reducing: Any) -> None:
    reducing.call(ev.PauseJob, "job-1")
    assert [each.kind for each in reducing.told("w1", "job_command")] == [pb.JobCommand.KIND_PAUSE]
    reducing.report("job-1", 3, owner="w1", outcome=pb.JobReport.OUTCOME_PAUSED)
    assert reducing.state() == "PAUSED"
    reducing.call(ev.ResumeJob, "job-1")
    assert (reducing.state(), term(reducing)) == ("RUNNING", 2)


def test_the_last_member_stays_until_a_job_is_paused_that_is_to_be(cluster: Any) -> None:
    """What only it holds would be lost, and the job could not pause without it."""
    join(cluster, "w1")
    cluster.submit(edit=all_reduce)
    cluster.call(ev.PauseJob, "job-1")
    cluster.call(ev.DrainWorker, "w1")
    assert not cluster.told("w1", "revoke_job")
    assert not cluster.told("w1", "drain")
    cluster.report("job-1", 3, owner="w1", outcome=pb.JobReport.OUTCOME_PAUSED)
    assert cluster.state() == "PAUSED"
    cluster.feed(ev.Tick())
    assert cluster.told("w1", "drain")


def test_a_member_that_cannot_pause_a_job_alone_leaves(reducing: Any) -> None:
    reducing.storage_up = False
    reducing.call(ev.PauseJob, "job-1")
    for name in ("w1", "w2"):
        reducing.call(ev.DrainWorker, name)
        assert not reducing.told(name, "drain")
    reducing.kill("w3")
    for name in ("w1", "w2"):
        assert reducing.told(name, "drain")


def test_without_workers_a_pause_waits_for_one(reducing: Any) -> None:
    for name in ("w1", "w2", "w3"):
        reducing.kill(name)
    reducing.call(ev.PauseJob, "job-1")
    reducing.advance(60.0)
    assert (reducing.state(), reducing.job().reason) == ("RUNNING", "WAITING_FOR_WORKERS")
    assert "it pauses at its next step, for which it needs a worker" in reducing.job().message
    join(reducing, "w4")
    assert members(reducing) == ["w4"]
    assert [each.kind for each in reducing.told("w4", "job_command")] == [pb.JobCommand.KIND_PAUSE]
    reducing.report("job-1", 3, owner="w4", outcome=pb.JobReport.OUTCOME_PAUSED)
    assert reducing.state() == "PAUSED"


def test_a_job_that_is_paused_while_its_term_is_raised_stays_paused(reducing: Any) -> None:
    reducing.call(ev.PauseJob, "job-1")
    reducing.storage_up = False
    reducing.kill("w3")
    reducing.report("job-1", 3, owner="w1", outcome=pb.JobReport.OUTCOME_PAUSED)
    reducing.storage_up = True
    reducing.perform()
    reducing.run_operations()
    assert (reducing.state(), reducing.terms["job-1"]) == ("PAUSED", 2)
    reducing.call(ev.ResumeJob, "job-1")
    assert (reducing.state(), term(reducing), members(reducing)) == ("RUNNING", 3, ["w1", "w2"])


def test_a_worker_that_others_cannot_reach_takes_no_part(cluster: Any) -> None:
    cluster.worker("old")
    cluster.submit(edit=all_reduce)
    assert (cluster.state(), cluster.job().reason) == ("QUEUED", "WAITING_FOR_WORKERS")
    assert "old is left out: it tells no address" in cluster.job().message
    join(cluster, "w1")
    assert (cluster.state(), members(cluster)) == ("RUNNING", ["w1"])


def test_a_leaf_that_fails_is_tried_again_where_it_is_and_then_named(reducing: Any) -> None:
    shard = min(reducing.shards("w2"))
    for task in (1, 2, 3):
        assert reducing.state() == "RUNNING"
        failed = pb.LeafFailed(job_id="job-1", term=1, shard=shard, kind=1, task=task)
        reducing.say(reducing.sessions["w2"], leaf_failed=failed)
        assert shard in reducing.shards("w2")
    assert reducing.state() == "FAILED"
    assert reducing.job().failures[0].shard == shard


def waits_for(cluster: Any, teller: str, late_s: float, *names: str) -> None:
    late = [pb.LateWorker(worker_id=name, late_s=late_s) for name in names]
    cluster.report("job-1", 3, owner=teller, late_workers=late)


def test_a_member_that_holds_the_others_up_for_a_lease_takes_no_part_for_a_while(
    reducing: Any,
) -> None:
    lease_s = reducing.core.lease_ttl_s()
    waits_for(reducing, "w1", lease_s - 0.1, "w3")
    assert (term(reducing), members(reducing)) == (1, ["w1", "w2", "w3"])
    waits_for(reducing, "w2", lease_s + 0.1, "w3")
    assert (term(reducing), members(reducing)) == (2, ["w1", "w2"])
    covered(reducing)
    suspected = next(each for each in reducing.events if each.type == "WORKER_SUSPECTED")
    assert (suspected.worker_id, suspected.details["cause"]) == ("w3", "hang")
    assert "STEPS_REPLAYED" not in reducing.types()
    reducing.advance(lease_s + 0.5)
    assert members(reducing) == ["w1", "w2", "w3"], "it is tried again"


def test_a_term_that_was_raised_unheard_makes_a_new_one_although_all_take_part_again(
    reducing: Any,
) -> None:
    """Storage raises the term and its answer gets lost; asked again, it refuses."""
    lease_s = reducing.core.lease_ttl_s()
    reducing.storage_up = False
    waits_for(reducing, "w1", lease_s + 0.1, "w3")
    reducing.terms["job-1"] = 2
    reducing.advance(lease_s + 0.5)
    reducing.storage_up = True
    reducing.perform()
    reducing.run_operations()
    assert (term(reducing), members(reducing)) == (3, ["w1", "w2", "w3"])
    assert reducing.job().reason == ""
    assert "STEPS_REPLAYED" not in reducing.types()


def test_of_two_that_do_not_hear_each_other_one_leaves(reducing: Any) -> None:
    waits_for(reducing, "w2", 9.0, "w3")
    waits_for(reducing, "w3", 9.0, "w2")
    assert (term(reducing), members(reducing)) == (2, ["w1", "w2"])


def test_a_member_that_hears_nobody_is_the_one_to_leave(reducing: Any) -> None:
    waits_for(reducing, "w3", 9.0, "w1", "w2")
    assert members(reducing) == ["w1", "w2"]


def test_one_that_loads_the_job_for_too_long_is_a_member_once_it_is_ready(cluster: Any) -> None:
    cluster.auto = False
    for name in ("w1", "w2", "w3"):
        join(cluster, name)
    cluster.submit(edit=all_reduce)
    [described_by] = cluster.core.jobs["job-1"].describing
    cluster.describe(cluster.sessions[described_by], "job-1")
    assert (term(cluster), members(cluster)) == (1, ["w1", "w2", "w3"])
    ready = pb.WorkerJobReady(job_id="job-1", term=1)
    cluster.say(cluster.sessions["w1"], worker_job_ready=ready)
    waits_for(cluster, "w1", 9.0, "w2", "w3")
    assert (term(cluster), members(cluster)) == (2, ["w1"])
    assert "WORKER_SUSPECTED" not in cluster.types()
    assert not cluster.told("w2", "revoke_job"), "it goes on loading"
    ready = pb.WorkerJobReady(job_id="job-1", term=2)
    cluster.say(cluster.sessions["w2"], worker_job_ready=ready)
    assert sorted(members(cluster)) == ["w1", "w2"]


def test_copies_that_a_member_asks_for_are_told(reducing: Any) -> None:
    copies = pb.CopiesStarted(
        job_id="job-1", term=1, step=3, worker_id="w3", cause="late", shards=[11], copied_to=["w1"]
    )
    reducing.say(reducing.sessions["w2"], copies_started=copies)
    told = next(each for each in reducing.events if each.type == "SPECULATION_STARTED")
    assert (told.worker_id, told.details["workers"]) == ("w3", "w1")


@pytest.mark.parametrize("stays", [True, False])
def test_what_was_described_before_more_with_other_bits_came_begins(
    cluster: Any, *, stays: bool
) -> None:
    cluster.storage_up = False
    cluster.worker("w2", slots=1, fingerprint="z", address="127.0.0.1:2")
    cluster.submit(edit=all_reduce)
    cluster.storage_up = True
    cluster.auto = False
    cluster.perform()
    assert list(cluster.core.jobs["job-1"].describing) == ["w2"]
    for name in ("w1", "w3"):
        cluster.worker(name, slots=1, fingerprint="a", address=f"127.0.0.1:{name[1]}")
    cluster.storage_up = False
    cluster.describe(cluster.sessions["w2"], "job-1")
    if not stays:
        cluster.kill("w2")
    cluster.storage_up = True
    cluster.perform()
    cluster.run_operations()
    if stays:
        assert (cluster.state(), members(cluster)) == ("RUNNING", ["w2"])
        return
    [describing] = cluster.core.jobs["job-1"].describing
    assert describing in ("w1", "w3")
    cluster.describe(cluster.sessions[describing], "job-1")
    assert (cluster.state(), members(cluster)) == ("RUNNING", ["w1", "w3"])


class Beats:
    """Four members with one slot each, whose heartbeats tell how long their leaves take."""

    def __init__(self, cluster: Any) -> None:
        self.cluster, self.step = cluster, 0
        self.leaf_s = dict.fromkeys(("w1", "w2", "w3", "w4"), 0.1)
        self.seconds = dict.fromkeys(self.leaf_s, 0.0)
        for name in self.leaf_s:
            join(cluster, name)
        cluster.submit(edit=all_reduce)

    def go(self, seconds: float) -> None:
        for _ in range(round(seconds / 0.5)):
            self.cluster.time_s += 0.5
            self.step += 1
            for name in self.leaf_s:
                self.seconds[name] += 5 * self.leaf_s[name]
                progress = pb.WorkerJobProgress(
                    job_id="job-1",
                    term=term(self.cluster),
                    step=self.step,
                    train_leaves=5 * self.step,
                    train_leaf_seconds=self.seconds[name],
                )
                heartbeat = pb.Heartbeat(jobs=[progress])
                self.cluster.say(self.cluster.sessions[name], heartbeat=heartbeat)
            self.cluster.report("job-1", self.step, owner=members(self.cluster)[0])
            self.cluster.feed(ev.Tick())

    def counts(self) -> list[int]:
        return [len(self.cluster.shards(name)) for name in sorted(members(self.cluster))]


@pytest.fixture
def beats(cluster: Any) -> Beats:
    return Beats(cluster)


def test_shards_of_members_follow_measured_speed_by_a_new_term(beats: Beats) -> None:
    beats.go(5.0)
    assert (term(beats.cluster), beats.counts()) == (1, [4, 4, 4, 4])
    beats.leaf_s["w3"] = 0.4
    beats.go(10.0)
    assert (term(beats.cluster), beats.counts()) == (2, [5, 5, 1, 5])
    covered(beats.cluster)
    (event,) = (each for each in beats.cluster.events if each.type == "SHARDS_MOVED")
    assert event.details["cause"] == "speed"
    assert "by measured speed" in event.message
    beats.go(20.0)
    assert term(beats.cluster) == 2, "they do not dance"
    beats.leaf_s["w3"] = 0.1
    beats.go(20.0)
    assert (term(beats.cluster), beats.counts()) == (3, [4, 4, 4, 4])


def test_a_member_however_slow_keeps_a_shard_and_no_term_follows_the_other(beats: Beats) -> None:
    beats.leaf_s["w3"] = 10.0
    beats.go(30.0)
    assert (term(beats.cluster), beats.counts()) == (2, [5, 5, 1, 5])


def test_a_term_that_begins_for_another_reason_has_shards_by_speed_at_once(beats: Beats) -> None:
    beats.leaf_s["w3"] = 0.4
    beats.go(10.0)
    beats.cluster.kill("w1")
    assert (term(beats.cluster), beats.counts()) == (3, [7, 2, 7])
    assert [each.details["cause"] for each in beats.cluster.events if each.type == "SHARDS_MOVED"][
        1:
    ] == ["members"]
    del beats.leaf_s["w1"]
    beats.go(30.0)
    assert term(beats.cluster) == 3
