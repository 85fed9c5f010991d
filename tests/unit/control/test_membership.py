"""Workers: joining, silence, death, leaving; where their shards go."""

from __future__ import annotations

from typing import Any

import pytest

from coordinator.control.core import events as ev
from phalanx.v1 import coordination_service_pb2 as pb

ALL = set(range(16))


def test_a_killed_worker_moves_only_its_own_shards(running: Any) -> None:
    before = {name: running.shards(name) for name in ("w1", "w2", "w3")}
    assert set().union(*before.values()) == ALL
    running.time_s += 1.0
    running.kill("w2")
    assert running.shards("w1") >= before["w1"]
    assert running.shards("w3") >= before["w3"]
    assert running.shards("w1") | running.shards("w3") == ALL
    assert not running.shards("w1") & running.shards("w3")
    lost = next(event for event in running.events if event.type == "WORKER_LOST")
    moved = next(event for event in running.events if event.type == "SHARDS_MOVED")
    assert lost.incident_id == moved.incident_id != ""
    running.time_s += 0.1
    running.report("job-1", 3)
    recovered = running.events[-1]
    assert (recovered.type, recovered.incident_id) == ("RECOVERED", lost.incident_id)
    assert recovered.details["commit_s"].startswith("0.1")
    assert not running.core.incidents
    phases = {dict(each.labels)["phase"] for each in running.observed if "recovery" in each.metric}
    assert phases == {"detect", "redispatch", "commit", "total"}
    redispatched = [each for each in running.observed if each.metric == "redispatches_total"]
    assert sum(each.value for each in redispatched) == len(before["w2"])


def test_a_commit_from_before_the_death_recovers_nothing(running: Any) -> None:
    running.time_s += 1.0
    running.kill("w2")
    running.report("job-1", 3, since_commit_s=1.0)
    assert "RECOVERED" not in running.types()


def test_a_commit_told_again_by_a_slower_report_is_no_new_one(running: Any) -> None:
    running.time_s += 1.0
    running.report("job-1", 3, since_commit_s=0.25)
    running.kill("w2")
    running.time_s += 1.0
    running.report("job-1", 3, since_commit_s=0.75)  # half a second under way
    assert "RECOVERED" not in running.types()
    running.report("job-1", 4, since_commit_s=0.125)
    assert running.events[-1].details["commit_s"] == "0.875000"


@pytest.mark.parametrize("since_s", [float("nan"), float("inf"), -30.0])
def test_ages_that_cannot_be_are_not_believed(running: Any, since_s: float) -> None:
    running.kill("w2")
    running.time_s += 0.5
    running.report("job-1", 3, since_commit_s=since_s, since_contribution_s=since_s)
    told = [each.details["commit_s"] for each in running.events if each.type == "RECOVERED"]
    assert told == (["0.500000"] if since_s < 0 else []), "no commit is later than its report"


def test_a_worker_that_returns_with_the_job_in_hand_gets_a_share_again(running: Any) -> None:
    assigned = running.told("w2", "assign_job")[-1]
    running.kill("w2")
    assert running.shards("w1") | running.shards("w3") == ALL
    held = pb.HeldWorkerJob(job_id="job-1", term=1, placement=assigned.placement, ready=True)
    held.train_nodes.extend(assigned.train_nodes)
    running.worker("w2", held_jobs=[held])
    assert len(running.shards("w2")) >= len(ALL) // 4
    running.report("job-1", running.job().progress.step + 3)
    owners = [running.shards(name) for name in ("w1", "w2", "w3")]
    assert set().union(*owners) == ALL
    assert sum(map(len, owners)) == len(ALL)


def test_the_last_worker_dies_and_another_comes(running: Any) -> None:
    for name in ("w1", "w2", "w3"):
        running.kill(name)
    assert (running.state(), running.job().reason) == ("RUNNING", "WAITING_FOR_WORKERS")
    assert "JOB_WAITING" in running.types()
    running.worker("w4")
    assert running.shards("w4") == ALL
    assert running.job().reason == ""


def test_a_silent_worker_is_suspected_then_lost(running: Any) -> None:
    for _ in range(5):
        running.time_s += 0.5
        running.heartbeats("w1", "w3", "a1")
        running.feed(ev.Tick())
    kinds = running.types()
    assert kinds.index("WORKER_SUSPECTED") < kinds.index("WORKER_LOST")
    assert running.shards("w1") | running.shards("w3") == ALL
    assert running.sessions["w2"] in running.closed


def test_a_suspected_worker_that_speaks_again_is_ready(running: Any) -> None:
    running.time_s += 0.6
    running.feed(ev.Tick())
    running.time_s += 0.6
    running.heartbeats("w1", "w3", "a1")
    running.feed(ev.Tick())
    assert "WORKER_SUSPECTED" in running.types()
    running.heartbeats("w2")
    running.time_s += 0.1
    running.feed(ev.Tick())
    assert "WORKER_LOST" not in running.types()


def test_mass_silence_makes_control_suspect_itself(running: Any) -> None:
    running.advance(2.25, alive=False)
    assert "WORKER_LOST" not in running.types()
    running.heartbeats()
    running.advance(1.0)
    assert "WORKER_LOST" not in running.types()


def test_who_is_silent_together_reaches_the_lease_one_by_one(running: Any) -> None:
    members = ("w1", "w2", "w3", "a1")
    for name in members * 2:
        running.time_s += 0.125
        running.heartbeats(name)
        running.feed(ev.Tick())
    running.advance(2.4, alive=False, tick_s=0.125)
    assert "WORKER_LOST" not in running.types()
    assert running.core.aggregators["a1"].connected
    running.heartbeats()
    running.advance(1.0)
    assert "WORKER_LOST" not in running.types()


def test_rule_11_no_range_is_taken_while_those_who_are_silent_reach_the_lease_one_by_one(
    running: Any,
) -> None:
    for name in ("a1", "w1", "w2", "w3"):
        running.time_s += 0.125
        running.heartbeats(name)
        running.feed(ev.Tick())
    running.advance(2.4, alive=False, tick_s=0.125)
    running.heartbeats()
    running.advance(1.0)
    assert running.core.facts.jobs["job-1"].term == 1


def test_mass_silence_that_lasts_is_believed(running: Any) -> None:
    running.advance(4.5, alive=False)
    assert running.types().count("WORKER_LOST") == 3


def test_broken_streams_are_believed_even_in_a_mass(running: Any) -> None:
    for name in ("w1", "w2", "w3"):
        running.kill(name)
    assert running.types().count("WORKER_LOST") == 3


def test_a_pause_of_control_itself_blames_nobody(running: Any) -> None:
    running.feed(ev.Tick())
    running.time_s += 60.0
    running.feed(ev.Tick())
    assert "WORKER_LOST" not in running.types()
    assert "AGGREGATOR_LOST" not in running.types()


def test_rule_11_who_is_heard_late_after_a_pause_of_control_was_not_silent(running: Any) -> None:
    running.feed(ev.Tick())
    running.time_s += 60.0
    running.heartbeats("w1", "w2", "a1")
    running.feed(ev.Tick())
    assert "WORKER_LOST" not in running.types()
    running.advance(1.0)
    assert "WORKER_LOST" not in running.types()


def test_a_new_worker_loads_first_and_then_takes_its_share(running: Any) -> None:
    running.auto = False
    running.worker("w4")
    assert running.told("w4", "assign_job")[-1].train_nodes == []
    before = {name: running.shards(name) for name in ("w1", "w2", "w3")}
    running.say(running.sessions["w4"], worker_job_ready=pb.WorkerJobReady(job_id="job-1", term=1))
    taken = running.shards("w4")
    assert len(taken) == 4
    kept = {name: running.shards(name) for name in ("w1", "w2", "w3")}
    assert kept == before, "the old hosts keep the shards until the new one works"
    placements = [each.placement for each in running.told("w4", "assign_job")]
    assert placements == sorted(set(placements))
    running.report("job-1", 1)
    running.report("job-1", 2)
    for name in ("w1", "w2", "w3"):
        assert running.shards(name) == before[name] - taken


def test_keepers_go_after_a_lease_even_without_steps(running: Any) -> None:
    running.worker("w4")
    taken = running.shards("w4")
    running.advance(2.5)
    for name in ("w1", "w2", "w3"):
        assert not running.shards(name) & taken


def test_a_shard_goes_back_to_its_keeper_when_the_new_host_dies(running: Any) -> None:
    before = {name: running.shards(name) for name in ("w1", "w2", "w3")}
    running.worker("w4")
    running.kill("w4")
    assert {name: running.shards(name) for name in ("w1", "w2", "w3")} == before


def test_more_slots_get_more_shards(cluster: Any) -> None:
    cluster.aggregator()
    cluster.worker("big", slots=6)
    cluster.worker("small", slots=2)
    cluster.submit()
    assert len(cluster.shards("big")) == 12
    assert len(cluster.shards("small")) == 4


def test_max_workers_and_labels_are_respected(cluster: Any) -> None:
    cluster.aggregator()
    cluster.worker("w1", labels={"zone": "a"})
    cluster.worker("w2", labels={"zone": "a"})
    cluster.worker("w3", labels={"zone": "b"}, slots=8)

    def pick(spec: Any) -> None:
        spec.resources.max_workers = 1
        spec.resources.worker_labels["zone"] = "a"

    cluster.submit(edit=pick)
    assert cluster.shards("w1") == ALL
    assert not cluster.told("w2", "assign_job")
    assert not cluster.told("w3", "assign_job")
    cluster.kill("w1")
    assert cluster.shards("w2") == ALL


def test_the_largest_fingerprint_group_is_chosen_and_journalled(cluster: Any) -> None:
    cluster.aggregator()
    # The first by name and by age, and the largest single worker.
    cluster.worker("odd", fingerprint="e", slots=3)
    cluster.worker("w1")
    cluster.worker("w2")
    cluster.submit()
    assert cluster.core.facts.jobs["job-1"].fingerprint == "f"
    assert not cluster.told("odd", "assign_job")
    event = next(each for each in cluster.events if each.type == "WORKER_INELIGIBLE")
    assert event.worker_id == "odd"
    cluster.kill("w1")
    cluster.kill("w2")
    assert cluster.job().reason == "WAITING_FOR_FINGERPRINT"
    cluster.advance(600, tick_s=1.0)
    assert cluster.job().reason == "WAITING_FOR_FINGERPRINT"
    cluster.worker("w3")
    assert cluster.shards("w3") == ALL


def test_fall_back_gives_bit_identity_up(cluster: Any) -> None:
    cluster.aggregator()
    cluster.worker("w1", slots=4)
    cluster.worker("odd", fingerprint="g")

    def fall_back(spec: Any) -> None:
        spec.reproducibility.bitwise.fall_back_after.seconds = 30

    cluster.submit(edit=fall_back)
    cluster.kill("w1")
    cluster.advance(29, tick_s=1.0)
    assert not cluster.told("odd", "assign_job")
    cluster.advance(3, tick_s=1.0)
    assert cluster.shards("odd") == ALL
    assert "BIT_IDENTITY_LOST" in cluster.types()
    cluster.report("job-1", 9, outcome=pb.JobReport.OUTCOME_STOPPED)
    assert not cluster.job().result.bit_identical


def test_tolerant_takes_everyone(cluster: Any) -> None:
    cluster.aggregator()
    cluster.worker("w1")
    cluster.worker("odd", fingerprint="g")
    cluster.submit(edit=lambda spec: spec.reproducibility.tolerant.SetInParent())
    assert cluster.shards("w1")
    assert cluster.shards("odd")


def test_drain_moves_shards_then_lets_the_worker_leave(running: Any) -> None:
    token = running.call(ev.DrainWorker, "w2")
    assert running.answers[token].worker.state == 3
    assert not running.told("w2", "drain")
    assert running.shards("w1") | running.shards("w3") == ALL
    running.report("job-1", 1)
    running.report("job-1", 2)
    assert running.told("w2", "revoke_job")
    assert running.told("w2", "drain")
    running.kill("w2")
    assert "WORKER_LEFT" in running.types()
    assert "WORKER_LOST" not in running.types()
    assert not running.core.facts.drains


def test_the_only_worker_may_leave_at_once(cluster: Any) -> None:
    cluster.aggregator()
    session = cluster.worker("w1")
    cluster.submit()
    cluster.say(session, drain_requested=pb.DrainRequested())
    assert cluster.told("w1", "drain")
    assert cluster.job().reason == "WAITING_FOR_WORKERS"


def test_a_worker_of_the_same_name_replaces_the_old_one(running: Any) -> None:
    old = running.sessions["w2"]
    running.worker("w2", incarnation="w2-2")
    assert old in running.closed
    assert running.types().count("WORKER_LOST") == 1
    running.feed(ev.SessionBroken(old))
    assert running.types().count("WORKER_LOST") == 1


def test_a_hello_of_a_higher_generation_is_not_served(cluster: Any) -> None:
    session = cluster.worker("w1", generation=99)
    assert cluster.closed[session].reason == "STALE_GENERATION"
    assert not cluster.core.workers


@pytest.mark.parametrize("hello", [{"slots": 0}, {"incarnation": ""}])
def test_a_hello_that_makes_no_sense_is_refused(cluster: Any, hello: dict[str, Any]) -> None:
    session = cluster.worker("w1", **hello)
    assert session in cluster.closed
    assert not cluster.core.workers


def test_a_suspected_worker_that_speaks_again_takes_what_nobody_hosts(cluster: Any) -> None:
    def one(spec: Any) -> None:
        spec.resources.max_workers = 1

    cluster.aggregator()
    cluster.worker("w1")
    cluster.worker("w2")
    cluster.submit(edit=one)
    cluster.time_s += 1.2
    cluster.heartbeats("w1", "a1")
    cluster.feed(ev.Tick())
    cluster.kill("w1")
    assert not cluster.shards("w2")
    assert "not been heard of" in cluster.job().message
    cluster.heartbeats("w2")
    assert cluster.shards("w2") == ALL


def test_heartbeats_and_leases_grow_with_the_cluster(cluster: Any) -> None:
    for number in range(150):
        cluster.worker(f"w{number}")
    welcome = cluster.told("w149", "welcome")[0]
    assert welcome.heartbeat_interval_s == pytest.approx(0.75)
    assert welcome.lease_ttl_s == pytest.approx(3.0)
    assert welcome.answers_heartbeats


def test_a_member_of_a_large_cluster_keeps_its_lease_when_the_others_leave(cluster: Any) -> None:
    """It still sends the slow heartbeats that it was told to send."""
    for number in range(150):
        cluster.worker(f"w{number}")
    for number in range(149):
        cluster.kill(f"w{number}")
    cluster.advance(2.5, alive=False)
    assert cluster.core.workers["w149"].connected
    cluster.advance(1.0, alive=False)
    assert not cluster.core.workers["w149"].connected


def ended(cluster: Any, name: str, **counts: int) -> None:
    """A heartbeat of a worker: `calls_crashed=2`, `leaves_done=7`."""
    attempts = []
    for key, count in counts.items():
        what, _, how = key.partition("_")
        failed = pb.LeafFailed.KIND_UNSPECIFIED
        if how != "done":
            failed = pb.LeafFailed.Kind.Value(f"KIND_{how.upper()}")
        attempts.append(pb.EndedAttempts(calls=what == "calls", failed=failed, count=count))
    cluster.say(cluster.sessions[name], heartbeat=pb.Heartbeat(ended_attempts=attempts))


def attempts_counted(cluster: Any) -> dict[str, float]:
    counted: dict[str, float] = {}
    for each in cluster.observed:
        if each.metric == "tasks_total":
            labels = dict(each.labels)
            key = f"{labels['program']}/{labels['outcome']}"
            counted[key] = counted.get(key, 0) + each.value
    return counted


def test_attempts_are_counted_once_by_how_they_ended(cluster: Any) -> None:
    cluster.worker("w1")
    cluster.worker("w2")
    ended(cluster, "w1")
    ended(cluster, "w2")
    ended(cluster, "w1", leaves_done=5)
    ended(cluster, "w2", leaves_done=2, leaves_non_finite=1, calls_crashed=2)
    ended(cluster, "w1", leaves_done=8)
    cluster.kill("w1")
    cluster.worker("w1")  # the same process on another session: it goes on where it was
    ended(cluster, "w1", leaves_done=9, calls_done=1)
    assert attempts_counted(cluster) == {
        "train/done": 11,
        "train/non_finite": 1,
        "tasks/crashed": 2,
        "tasks/done": 1,
    }
    cluster.worker("w2", incarnation="w2-2")
    ended(cluster, "w2")
    ended(cluster, "w2", leaves_done=1)
    assert attempts_counted(cluster)["train/done"] == 12


def test_what_ended_under_another_leader_is_not_counted_again(cluster: Any) -> None:
    cluster.worker("w1")
    ended(cluster, "w1")
    ended(cluster, "w1", leaves_done=70)
    cluster.lead()
    cluster.worker("w1")
    ended(cluster, "w1", leaves_done=90)
    ended(cluster, "w1", leaves_done=91)
    assert attempts_counted(cluster) == {"train/done": 1}


def test_a_worker_cannot_make_up_ends(cluster: Any) -> None:
    session = cluster.worker("w1")
    ended(cluster, "w1", leaves_done=5)
    attempts = [pb.EndedAttempts(failed=99, count=7), pb.EndedAttempts(count=2)]  # type: ignore[arg-type]
    cluster.say(session, heartbeat=pb.Heartbeat(ended_attempts=attempts))
    assert attempts_counted(cluster) == {}


def test_a_thundering_herd_is_comes_back_and_nothing_moves(cluster: Any) -> None:
    """After a take-over 60 workers say what they hold: nothing moves and no term is raised."""
    cluster.aggregator()
    for number in range(16):
        cluster.worker(f"w{number}")
    cluster.submit()
    held = {name: cluster.told(name, "assign_job")[-1] for name in list(cluster.sessions)[1:]}
    cluster.lead()
    ranges = [pb.HeldRanges(job_id="job-1", term=1, range_indexes=[0], version=3)]
    cluster.aggregator(held_ranges=ranges)
    for number in range(60):
        name = f"w{number}"
        mine = held.get(name)
        jobs = []
        if mine is not None:
            jobs = [
                pb.HeldWorkerJob(
                    job_id="job-1",
                    term=1,
                    placement=mine.placement,
                    train_nodes=mine.train_nodes,
                    evaluation_nodes=mine.evaluation_nodes,
                    ready=True,
                )
            ]
        cluster.worker(name, held_jobs=jobs)
    assert cluster.core.facts.jobs["job-1"].term == 1
    owners = set(cluster.core.jobs["job-1"].train.owners.values())
    assert owners == {name for name, each in held.items() if each.train_nodes}
    assert "SHARDS_MOVED" not in cluster.types()
