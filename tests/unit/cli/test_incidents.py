"""Incidents and dead letters as people and programs read them."""

import pytest

from phalanx.v1 import job_pb2

START_NANOS = 1_700_000_000_000_000_000
ID = "incident-1-1"


def event(sequence: int, type_: str, after_s: float, **fields: object) -> job_pb2.Event:
    details = fields.pop("details", {})
    made = job_pb2.Event(sequence=sequence, type=type_, job_id="digits-1", incident_id=ID, **fields)
    made.time.FromNanoseconds(START_NANOS + int(after_s * 1e9))
    made.details.update(details)
    return made


@pytest.fixture
def story(cluster):
    cluster.events = [
        job_pb2.Event(sequence=1, type="JOB_STARTED", job_id="digits-1"),
        event(
            2,
            "SPECULATION_STARTED",
            0.13,
            worker_id="worker-2",
            message="4 shards of worker-2 are copied by worker-1, worker-3: nothing came within "
            "0.131 s (late after 0.120 s)",
            details={"cause": "late"},
        ),
        event(3, "WORKER_LOST", 2.0, worker_id="worker-2", message="worker-2: no heartbeat"),
        event(
            4,
            "RECOVERED",
            2.1,
            message="step 8 committed 0.100 s after the loss of worker-2",
            details={
                "cause": "worker_silent",
                "began_unix_s": f"{START_NANOS / 1e9:.6f}",
                "suspected_after_s": "0.131",
                "fenced_after_s": "2.0",
                "redispatched_after_s": "2.0",
                "recomputed_after_s": "2.09",
                "committed_after_s": "2.1",
            },
        ),
    ]
    return cluster.events


def test_the_time_line_of_an_incident_fits_a_terminal(phalanx, story):
    shown = phalanx("events", "--incident", ID)
    assert shown.code == 0
    lines = shown.out.splitlines()
    assert max(len(line) for line in lines) <= 80
    assert lines[0] == "incident-1-1: worker_silent of worker-2"
    times = [line.split()[0] for line in lines if line[:9].strip() and line[9:12] == " s "]
    assert times == ["0.000", "0.130", "2.000", "2.090", "2.100"]
    assert [line.split()[2] for line in lines if line[9:12] == " s "] == [
        "began",
        "SPECULATION_STARTED",
        "WORKER_LOST",
        "recomputed",
        "RECOVERED",
    ]
    assert "redispatched 2.000, recomputed 2.090, committed 2.100" in " ".join(shown.out.split())


def test_incidents_are_a_table_with_one_line_each(phalanx, story):
    shown = phalanx("events", "--incidents").out.splitlines()
    assert len(shown) == 2
    assert shown[1].split()[:3] == [ID, "worker-2", "worker_silent"]
    assert shown[1].split()[3:] == ["0.13", "2.00", "2.00", "2.09", "2.10"]
    assert max(len(line) for line in shown) <= 80


def test_incidents_for_programs(phalanx, story):
    listed = phalanx("--json", "events", "--incidents", "--job", "digits-1").json()
    (found,) = listed["incidents"]
    assert (found["incident_id"], found["member"], found["recovered"]) == (ID, "worker-2", True)
    assert found["recomputed_after_s"] == 2.09
    assert phalanx("--json", "events", "--incidents", "--job", "other").json()["incidents"] == []
    told = phalanx("--json", "events", "--incident", ID).json()
    assert [each["sequence"] for each in told["events"]] == [2, 3, 4]


def test_a_take_over_is_told_like_any_other_failure(phalanx, cluster):
    known = {
        "cause": "control_lost",
        "member": "control-1",
        "began_unix_s": f"{START_NANOS / 1e9:.6f}",
        "fenced_after_s": "2.0",
        "replayed_after_s": "2.1",
    }
    cluster.events = [
        event(1, "CONTROL_TOOK_OVER", 2.1, message="control-2 leads", details=known),
        event(2, "WORKER_JOINED", 2.5, worker_id="worker-1", message="worker-1 joined"),
        event(
            3,
            "RECOVERED",
            2.625,
            message="step 8 committed",
            details={**known, "adopted_after_s": "2.5", "committed_after_s": "2.625"},
        ),
    ]
    cluster.events[0].job_id = cluster.events[1].job_id = ""
    (row,) = phalanx("events", "--incidents").out.splitlines()[1:]
    assert row.split() == [ID, "control-1", "control_lost", "2.00", "2.50", "2.62"]
    lines = phalanx("events", "--incident", ID).out.splitlines()
    assert lines[0] == f"{ID}: control_lost of control-1"
    assert max(map(len, lines)) <= 80
    told = "fenced 2.000, replayed 2.100, adopted 2.500, committed 2.625"
    assert told in " ".join(" ".join(lines).split())
    # Before a job has gone on: what is known by then.
    cluster.events = cluster.events[:2]
    (found,) = phalanx("--json", "events", "--incidents").json()["incidents"]
    assert (found["member"], found["recovered"]) == ("control-1", False)
    assert (found["replayed_after_s"], found["adopted_after_s"]) == (2.1, None)


def test_storage_that_was_away_is_told_like_any_other_failure(phalanx, cluster):
    known = {
        "cause": "storage_lost",
        "began_unix_s": f"{START_NANOS / 1e9:.6f}",
        "suspected_after_s": "1.5",
    }
    waits = {**known, "member": "aggregator-1"}
    cluster.events = [
        event(1, "STORAGE_UNAVAILABLE", 1.5, message="a checkpoint waits", details=waits),
        event(2, "STORAGE_UNAVAILABLE", 1.75, message="decisions wait", details=known),
        event(3, "STORAGE_RESTORED", 7.0, message="storage answers again", details=known),
        event(
            4,
            "STORAGE_RESTORED",
            7.25,
            message="checkpoints are written again",
            details={**waits, "restored_after_s": "7.25"},
        ),
    ]
    (row,) = phalanx("events", "--incidents").out.splitlines()[1:]
    assert row.split() == [ID, "storage", "storage_lost", "1.50", "7.25"]
    shown = phalanx("events", "--incident", ID).out
    assert shown.splitlines()[0] == f"{ID}: storage_lost of storage"
    assert "suspected 1.500, restored 7.250" in " ".join(shown.split())
    assert "not recovered" not in shown
    cluster.events = cluster.events[:3]
    (found,) = phalanx("--json", "events", "--incidents").json()["incidents"]
    assert (found["recovered"], found["restored_after_s"]) == (False, None)


def test_an_incident_without_an_end_says_so(phalanx, cluster, story):
    cluster.events = story[:3]
    assert "not recovered yet" in phalanx("events", "--incident", ID).out
    (found,) = phalanx("--json", "events", "--incidents").json()["incidents"]
    assert found["committed_after_s"] is None


def test_an_unknown_incident_is_not_found(phalanx, story):
    assert phalanx("events", "--incident", "incident-9-9").code == 3


def test_following_incidents_is_refused(phalanx, story):
    assert phalanx("events", "--incidents", "-f").code == 2


def test_events_name_their_incident(phalanx, story):
    assert phalanx("events").out.splitlines()[1].endswith(f"[{ID}]")


@pytest.fixture
def failed(cluster):
    job = job_pb2.Job(id="digits-1", state=job_pb2.Job.STATE_FAILED)
    cluster.jobs[job.id] = job
    job.failures.add(
        code="POISON_SHARD",
        message="the leaf of shard 3 (rows 300 to 399) failed 2 times: boom",
        shard=3,
        first_row=300,
        row_count=100,
        step=17,
        attempts=2,
        worker_ids=["worker-1", "worker-2"],
        traceback="Traceback …",
    )
    return job


def test_dead_letters_name_shard_rows_attempts_and_workers(phalanx, failed):
    shown = phalanx("jobs", "--dead-letters")
    assert shown.code == 0
    assert "shard 3, rows 300 to 399, step 17, 2 attempts on worker-1, worker-2" in shown.out
    assert "phalanx retry" in shown.err
    (letter,) = phalanx("--json", "jobs", "--dead-letters").json()["dead_letters"]
    assert (letter["job_id"], letter["shard"], letter["attempts"]) == ("digits-1", 3, 2)
    assert letter["traceback"] == "Traceback …"


def test_a_failure_before_the_first_leaf_names_no_shard(phalanx, cluster):
    job = job_pb2.Job(id="digits-1", state=job_pb2.Job.STATE_FAILED)
    job.failures.add(code="JOB_CODE", message="TypeError: no such layer", traceback="Traceback …")
    cluster.jobs[job.id] = job
    assert phalanx("jobs", "--dead-letters").out == (
        "digits-1  JOB_CODE\n  TypeError: no such layer\n"
    )
    assert "shard" not in phalanx("show", "digits-1").err


def test_no_dead_letters(phalanx, cluster):
    shown = phalanx("jobs", "--dead-letters")
    assert (shown.code, shown.out) == (0, "")
    assert "no job has failed" in shown.err


def test_dead_letters_of_another_state_are_refused(phalanx, failed):
    assert phalanx("jobs", "--dead-letters", "--state", "running").code == 2
