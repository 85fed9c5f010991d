"""Whole clusters under faults, in virtual time: nothing lost, nothing doubled, the same bits."""

from __future__ import annotations

import os
import shlex
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.simulation.__main__ import main
from tests.simulation.batch import command, run_seeds, summary, told, vacuous
from tests.simulation.cluster import services
from tests.simulation.jobs import BAD
from tests.simulation.kept import Kept, kept_in, sources_sha256
from tests.simulation.known import Known
from tests.simulation.newcomer import BAD as WORSE
from tests.simulation.rare import GARBAGE
from tests.simulation.runs import KINDS, simulate
from tests.simulation.scenarios import command_of, scenarios, told_of
from tests.simulation.scenes import SCENES, shown

pytestmark = pytest.mark.slow

SEEDS = range(1000, 1300)
BLOCK = 25


BLOCKS = range(SEEDS.start, SEEDS.stop, BLOCK)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Where outcomes are kept for whichever process adds them up."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    (shared / "outcomes").mkdir(exist_ok=True)
    return shared / "outcomes"


def block(folder, first):
    """Run a block of seeds, and keep what came of it."""
    done = run_seeds(range(first, first + BLOCK))
    with tempfile.TemporaryDirectory(dir=folder) as own:
        kept = Kept(Path(own) / "outcomes")
        for outcome in done:
            kept.add(outcome)
        kept.close()
        (Path(own) / "outcomes").replace(folder / str(first))
    return done


@pytest.mark.parametrize("first", BLOCKS)
def test_every_seed_keeps_every_promise(first, folder):
    failed = [told(outcome) for outcome in block(folder, first) if outcome.failure]
    assert not failed, "\n".join(failed)


@pytest.fixture
def given():
    with services() as made:
        yield made


def of_kind(kind):
    return [name for name in scenarios() if name.startswith(f"{kind}/")]


@pytest.mark.parametrize("name", of_kind("found"))
def test_a_scenario_that_once_found_a_bug_finds_none(given, name):
    outcome = scenarios()[name].run(given)
    assert outcome.failure == "", told_of(name, outcome)


@pytest.mark.parametrize("name", of_kind("misjudged"))
def test_what_is_right_is_not_blamed(given, name):
    outcome = scenarios()[name].run(given)
    assert outcome.failure == "", told_of(name, outcome)


@pytest.mark.parametrize("name", of_kind("scene"))
def test_a_scene_shows_what_it_is_about(given, name):
    outcome = scenarios()[name].run(given)
    assert outcome.failure == "", told_of(name, outcome)
    what = SCENES[scenarios()[name]]
    assert shown(outcome, what) > 0, f"{what} did not come about: {command_of(name)}"


def test_worse_jobs_end_as_they_must(given):
    ended, refused = Counter(), 0
    for name in of_kind("newcomer"):
        outcome = scenarios()[name].run(given)
        assert outcome.failure == "", told_of(name, outcome)
        ended += outcome.worse_jobs
        refused += outcome.refused
    assert ended.keys() == set(WORSE)
    assert refused > 0


@pytest.mark.parametrize("name", of_kind("control-dies"))
def test_the_deaths_of_control_alone_roll_nothing_back(given, name):
    outcome = scenarios()[name].run(given)
    assert outcome.faults["kill_control"] > 3
    assert outcome.failure == "", told_of(name, outcome)


@pytest.mark.timeout(1800)
def test_the_batch_proves_something(folder):
    """Blocks that no process has run, or none has run to its end, are run here."""
    made_by = sources_sha256()
    outcomes = [
        outcome
        for first in BLOCKS
        for outcome in kept_in(folder / str(first), made_by).values() or block(folder, first)
    ]
    assert len(outcomes) == len(SEEDS)
    found = summary(outcomes, 1, 1.0)
    assert found["vacuous"] == []
    assert (found["lost"], found["doubled"], found["stale_accepted"]) == (0, 0, 0)
    assert found["sha_equal_fraction"] == 1.0
    assert found["best_kept"] > 0
    assert found["fenced_off"] > 0
    assert found["leaders_outlived"] > 0


def test_a_seed_is_the_same_run_every_time():
    with services() as given:
        first = [simulate(given, seed) for seed in (7, 8)]
        second = [simulate(given, seed) for seed in (8, 7)]
    assert [each.trace for each in first] == [each.trace for each in reversed(second)]
    assert first[0].trace != first[1].trace
    assert first[0].transitions == second[1].transitions


def test_a_batch_without_faults_or_work_is_refused():
    with services() as given:
        outcome = simulate(given, 7)
    found = summary([outcome] * 200, 1, 1.0)
    assert any("never happened" in why for why in found["vacuous"])
    outcome.faults = Counter(dict.fromkeys(KINDS, 1))
    outcome.steps, outcome.copies_raced = 100, 0
    found = summary([outcome] * 200, 1, 1.0)
    assert found["vacuous"] == ["no late shard ever came both as a copy and from its own worker"]
    outcome.copies_raced = 1
    found = summary([outcome] * 300, 1, 1.0)
    assert found["vacuous"] == [
        "no write to storage's disk was ever torn",
        "no write to storage's disk was ever lost",
    ]
    outcome.updated = 1
    assert summary([outcome] * 200, 1, 1.0)["vacuous"] == [
        "nobody was ever lost between the two rounds of a step"
    ]
    outcome.cut_between = 1
    outcome.steps = 10
    found = summary([outcome] * 200, 1, 1.0)
    assert found["vacuous"] == ["10.0 committed steps per seed are too few"]
    outcome.steps = 100
    outcome.faults = Counter(["kill_worker"])
    why = vacuous(summary([outcome], 1, 1.0), outcome.faults)
    assert why == ["1.0 kinds of fault per seed are too few"]
    outcome.errands, outcome.bad_jobs = 2, Counter(dict.fromkeys(BAD[1:], 1))
    outcome.faults = Counter(dict.fromkeys(KINDS, 1))
    why = summary([outcome] * 90, 1, 1.0)["vacuous"]
    assert why == [f"no job with such a bad leaf ended: {BAD[0]}"]
    outcome.errands = 0
    outcome.started, outcome.faults = 9, Counter(dict.fromkeys(KINDS - {"bit_rot"}, 1))
    assert summary([outcome] * 90, 1, 1.0)["vacuous"] == [
        "these never happened to contributions one by one: bit_rot",
        "no shard ever was as far ahead of the others as its bound lets it",
        "no contribution ever came to a step that its shard had completed",
    ]


def test_a_failing_seed_prints_the_command_that_replays_it(capsys, monkeypatch):
    monkeypatch.setattr("tests.simulation.references.reference_sha256", lambda *_: "0" * 64)
    monkeypatch.setattr("tests.simulation.batch.STEPS_PER_SEED", 0.0)
    assert main(["--seeds", "1", "--first", "7"]) == 1
    assert command(7) in capsys.readouterr().err
    assert main(command(7).split()[3:]) == 1
    assert "other bits" in capsys.readouterr().out


def test_what_a_callback_of_the_world_sees_fails_the_seed_as_well(given, monkeypatch):
    def play(cluster, name, oracle, begins_s):
        cluster.world.at(0.5, lambda: oracle.fail("seen between two tasks"))

    monkeypatch.setattr("tests.simulation.runs.play", play)
    assert simulate(given, 1000).failure == "seen between two tasks"


def test_a_user_who_breaks_down_fails_the_seed(given, monkeypatch):
    async def looks(self):
        raise ValueError("which nobody expects")

    monkeypatch.setattr("tests.simulation.neighbour.Neighbour._looks_at_jobs", looks)
    assert "which nobody expects" in Known(0, settings=(("neighbour", True),)).run(given).failure


def test_a_job_that_nobody_forgets_is_found(given, monkeypatch):
    monkeypatch.setattr("coordinator.control.core.verbs.expire", lambda core: None)
    for scene in (Known(8, *GARBAGE), Known(2533)):
        assert "nobody forgets job" in scene.run(given).failure


def test_a_failing_scenario_is_replayed_by_the_command_that_it_prints(capsys, monkeypatch):
    monkeypatch.setattr("tests.simulation.references.reference_sha256", lambda *_: "0" * 64)
    name = of_kind("control-dies")[0]
    assert main(shlex.split(command_of(name))[3:]) == 1
    told = capsys.readouterr().out
    assert "kill control" in told
    assert told.endswith(f"ended with other bits\n  {command_of(name)}\n")
    with pytest.raises(SystemExit):
        main(["--scene", "nowhere/0"])


def test_afterwards_every_clock_is_real_again():
    from coordinator.control import leader

    assert leader.time is time
