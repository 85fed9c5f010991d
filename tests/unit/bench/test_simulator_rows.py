"""What the summary of the simulator becomes: a failed or empty batch never looks reached."""

from bench.reliability.simulator import rows_of

SUMMARY = {
    "seeds": 300,
    "processes": 2,
    "transitions_per_s": 25_000,
    "steps_per_seed": 60.0,
    "faults_per_seed": 9.5,
    "fault_kinds_per_seed": 6.0,
    "jobs": 400,
    "sha_equal": 390,
    "cancelled": 10,
    "sha_equal_fraction": 1.0,
    "lost": 0,
    "doubled": 0,
    "stale_accepted": 0,
    "stale_refused": 1_800,
    "fenced_off": 1_200,
    "leaders_outlived": 700,
    "failures": [],
    "vacuous": [],
}


def _missed(**changed):
    rows = rows_of({**SUMMARY, **changed}, "command", quick=False)
    assert {row.name: row.trials for row in rows if row.trials != 300} == {
        "simulator_sha_equal": 390,
        "stale_writes_accepted_simulated": {**SUMMARY, **changed}["fenced_off"],
    }
    return {row.name.removeprefix("simulator_") for row in rows if not row.reached}


def test_a_good_batch_reaches_everything():
    assert _missed() == set()


def test_each_shortcoming_shows():
    failure = {"seed": 7, "failure": "two leaders", "command": "replay 7"}
    assert _missed(failures=[failure]) == {"seeds_failed"}
    assert _missed(vacuous=["too few steps"]) == {"seeds_failed"}
    assert _missed(transitions_per_s=19_999) == {"transitions_per_s"}
    assert _missed(steps_per_seed=49.9) == {"steps_per_seed"}
    assert _missed(fault_kinds_per_seed=4.9) == {"fault_kinds_per_seed"}
    assert _missed(lost=1) == {"examples_lost"}
    assert _missed(doubled=1) == {"examples_doubled"}
    assert _missed(sha_equal=389) == {"sha_equal"}
    assert _missed(stale_accepted=1) == {"stale_writes_accepted_simulated"}
    assert _missed(fenced_off=999) == {"stale_writes_accepted_simulated"}


def test_a_failed_seed_is_named_with_the_command_that_replays_it():
    failure = {"seed": 7, "failure": "two leaders", "command": "replay 7"}
    (row, *_) = rows_of({**SUMMARY, "failures": [failure]}, "command", quick=False)
    assert "replay 7" in row.note
