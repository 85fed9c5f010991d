"""Goodput and recovery times from times of commits that are known exactly."""

import json

import pytest

from phalanx.chaos.report import (
    Commit,
    Counters,
    Injected,
    Span,
    gaps,
    longest_wait,
    percentile,
    rate,
    steps_at,
    summarise,
)


def _commits(*times: float) -> list[Commit]:
    return [Commit(step, time) for step, time in enumerate(times, start=1)]


STEADY = _commits(*(0.5 * step for step in range(61)))  # two steps per second for 30 s
AT_ONCE = [Injected(10.1, "kill-worker", "w")]  # recovered from within a step
BEFORE, DISTURBED, AFTER = Span(0, 10), Span(10, 20), Span(20, 30)


def _summary(commits, injected=(), **fields):
    values = {"job_id": "j", "state": "RUNNING", "seed": 0, "counters": Counters(0, 0)}
    return summarise(commits, DISTURBED, [BEFORE, AFTER], injected, **{**values, **fields})


def test_steps_are_counted_with_the_part_of_the_one_under_way():
    commits = _commits(0.0, 1.0, 3.0)
    assert [steps_at(commits, at) for at in (-1, 0, 0.5, 1, 2, 3, 9)] == [1, 1, 1.5, 2, 2.5, 3, 3]


def test_an_undisturbed_run_has_the_goodput_1():
    report = _summary(STEADY, AT_ONCE)
    assert report.goodput == pytest.approx(1)
    assert report.undisturbed_steps_per_s == pytest.approx(2)
    assert report.usual_gap_s == pytest.approx(0.5)
    assert report.longest_gap_s == pytest.approx(0.5)
    assert report.recovery_p50_s == pytest.approx(0)


def test_faults_that_harm_nobody_are_no_recoveries_and_give_no_goodput():
    spare = Injected(12.0, "kill-aggregator", "aggregator-2", idle=True)
    for injected in ([], [spare]):
        report = _summary(STEADY, injected)
        assert (report.harmful, report.goodput, report.recovery_p50_s) == (0, None, None)
        assert report.to_json()["harmful"] == 0
    before = [0.5 * step for step in range(25)]  # up to 12 s
    after = [14.5 + 0.5 * step for step in range(40)]
    report = _summary(_commits(*before, *after), [Injected(12.1, "kill-worker", "w"), spare])
    assert [(each.idle, each.recovery_s) for each in report.injuries] == [
        (True, 0.0),
        (False, pytest.approx(2.0)),
    ]
    assert (report.harmful, report.recovery_p50_s) == (1, pytest.approx(2.0))
    assert report.goodput == pytest.approx(0.8)


def test_a_job_that_stops_is_not_blamed_on_a_spare():
    spare = Injected(12.2, "kill-aggregator", "aggregator-2", idle=True)
    report = _summary(STEADY[:25], [Injected(11.9, "kill-worker", "w"), spare])
    assert [(each.idle, each.recovered) for each in report.injuries] == [
        (False, False),
        (True, True),
    ]
    assert not report.healthy


def test_a_pause_of_two_seconds_costs_a_fifth_of_ten():
    before = [0.5 * step for step in range(25)]  # up to 12 s
    after = [14.5 + 0.5 * step for step in range(40)]
    injected = [Injected(12.1, "kill-worker", "worker-1"), Injected(16.0, "kill-worker", "w")]
    report = _summary(_commits(*before, *after), injected)
    assert report.steps_per_s == pytest.approx(1.6)
    assert report.goodput == pytest.approx(0.8)
    assert [each.recovery_s for each in report.injuries] == pytest.approx([2.0, 0.0])
    assert report.injuries[0].at_s == pytest.approx(2.1)
    assert report.recovery_max_s == pytest.approx(2.0)
    assert report.longest_gap_s == pytest.approx(2.5)


def test_a_gap_is_in_every_span_that_it_touches():
    commits = _commits(0, 1, 2, 6, 7)
    assert gaps(commits, Span(3, 4)) == [4]
    assert gaps(commits, Span(2, 6)) == [4]
    assert gaps(commits, Span(6.5, 8)) == [1]


def test_a_wait_begins_with_the_step_in_which_the_fault_happened_and_ends_with_the_next_fault():
    commits = _commits(0, 1, 2, 6, 7)
    assert longest_wait(commits, Span(2.5, 9), 1.0, 7) == 4
    assert longest_wait(commits, Span(4, 9), 1.0, 7) == 3, "it had not begun yet"
    assert longest_wait(commits, Span(0.5, 2.3), 1.0, 7) == 1, "another fault made it so long"
    assert longest_wait(commits, Span(6.5, 9), 1.0, 7) == 1
    assert longest_wait(commits, Span(6.5, 9), 1.0, 20) == 2, "it goes on to the end of the span"
    assert longest_wait([], Span(0, 1), 1.0, 1) == 0


def test_steps_that_were_seen_together_do_not_hide_a_wait():
    commits = [Commit(1, 0.0), Commit(2, 0.1), Commit(13, 3.1), Commit(14, 3.2)]
    assert longest_wait(commits, Span(0.1, 3.2), 0.1, 3.2) == pytest.approx(2.0)


def test_thinned_commits_count_per_step():
    assert gaps([Commit(10, 0.0), Commit(14, 2.0)], Span(0, 2)) == [0.5]


def test_times_without_commits_say_nothing():
    assert rate([], [BEFORE], 30) is None
    assert rate(STEADY, [AFTER], 20) is None, "until when it is counted"
    report = _summary([Commit(1, 0.0)])
    assert (report.goodput, report.usual_gap_s, report.longest_gap_s) == (None, None, None)
    report = _summary([], [Injected(12, "kill-worker", "w")])
    assert (report.goodput, report.healthy) == (None, False)


def test_a_job_that_never_commits_again_has_not_recovered():
    commits = STEADY[:25]  # up to 12 s
    injected = [Injected(at_s, "kill-worker", "w") for at_s in (10.2, 12.2, 17.0)]
    report = _summary(commits, injected)
    assert [each.recovered for each in report.injuries] == [True, False, False]
    # Each until the next; the last until the end of all that was watched.
    assert [each.recovery_s for each in report.injuries] == pytest.approx([0.0, 4.5, 13.0])
    assert (report.not_recovered, report.healthy) == (2, False)
    assert report.usual_gap_s == pytest.approx(0.5)
    assert report.undisturbed_steps_per_s == pytest.approx(2), "after it nothing was as usual"
    assert report.goodput == pytest.approx(0.2), "4 steps instead of 20"
    assert report.longest_gap_s == pytest.approx(18)
    shown = report.to_json()["faults"]
    assert [each["recovered"] for each in shown] == [True, False, False]


def test_the_step_that_was_all_but_done_when_the_fault_came_is_no_recovery():
    injected = [Injected(11.0, "kill-worker", "w"), Injected(12.9, "kill-aggregator", "a")]
    report = _summary(STEADY[:27], injected)  # up to 13 s
    assert [each.recovered for each in report.injuries] == [True, False]
    assert report.injuries[1].recovery_s == pytest.approx(16.5)
    assert not report.healthy


def test_a_job_that_stops_after_it_had_recovered_is_not_healthy_either():
    report = _summary(STEADY[:49], [Injected(12.2, "kill-worker", "w")], watched_until_s=60.0)
    assert report.not_recovered == 1
    assert not report.healthy
    assert _summary(STEADY[:49], watched_until_s=60.0).healthy, "no fault of ours"


def test_a_job_that_succeeded_has_nothing_more_to_commit():
    injected = [Injected(11.0, "kill-worker", "w"), Injected(15.1, "kill-worker", "w")]
    report = _summary(STEADY[:31], injected, state="SUCCEEDED", watched_until_s=60.0)
    assert [each.recovered for each in report.injuries] == [True, True]
    assert (report.goodput, report.recovery_max_s) == (pytest.approx(1), pytest.approx(0))
    assert report.healthy


def test_a_step_under_way_at_the_end_is_neither_counted_nor_missed():
    report = _summary(STEADY[:60], AT_ONCE, watched_until_s=29.9)
    assert (report.goodput, report.healthy) == (pytest.approx(1), True)


def test_what_the_last_fault_costs_shows_after_the_faults_too():
    commits = _commits(*(0.5 * step for step in range(40)), *(28 + 0.5 * step for step in range(9)))
    calm = [BEFORE, Span(29, 32)]
    values = {"job_id": "j", "state": "RUNNING", "seed": 0, "counters": Counters(0, 0)}
    report = summarise(commits, DISTURBED, calm, [Injected(19.6, "kill-worker", "w")], **values)
    assert report.recovery_max_s == pytest.approx(8.0)
    assert (report.not_recovered, report.healthy) == (0, True)


def test_percentiles_are_values_that_occurred():
    assert percentile([], 50) is None
    assert percentile([3, 1, 2], 50) == 2
    assert percentile(list(range(1, 101)), 99) == 99
    assert percentile([1, 2], 99) == 2


def test_broken_promises_are_not_healthy():
    assert _summary(STEADY).healthy
    assert _summary(STEADY, bit_identical=True).healthy
    assert not _summary(STEADY, bit_identical=False).healthy
    assert not _summary(STEADY, counters=Counters(1, 0)).healthy
    assert not _summary(STEADY, counters=Counters(0, 1)).healthy
    assert not _summary(STEADY, state="FAILED").healthy
    assert _summary(STEADY, counters=Counters()).healthy, "unknown is not broken"


def test_the_json_is_flat_and_complete():
    report = _summary(STEADY, [Injected(12.0, "pause-worker", "worker-2")])
    shown = json.loads(json.dumps(report.to_json()))
    assert shown["faults"] == [
        {
            "at_s": 2.0,
            "fault": "pause-worker",
            "victim": "worker-2",
            "recovery_s": 0.0,
            "recovered": True,
            "idle": False,
        }
    ]
    assert shown["examples_lost"] == shown["examples_doubled"] == 0
    assert {"goodput", "recovery_p50_s", "recovery_p99_s", "bit_identical", "seed"} <= shown.keys()
