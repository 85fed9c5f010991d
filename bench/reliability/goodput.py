"""How much training is left under a rain of faults, and whether the bits are the same."""

from __future__ import annotations

from dataclasses import dataclass

from bench.reliability.jobs import GUARD_S, patient_cluster, patient_job, undisturbed_sha256
from bench.reliability.rows import Row, Rows
from phalanx.chaos.report import Report
from phalanx.chaos.run import Chaos, ChaosOptions
from phalanx.chaos.schedule import faults_named
from phalanx.chaos.victims import LocalVictims


@dataclass(frozen=True)
class Scenario:
    """A cluster, a job and how it is disturbed.

    ``shards`` leaves some slack: 9 shards are three leaves in a row on 4 workers and on the 3 that
    are left; 62 are two on 32 and on 31.
    """

    name: str
    what: str
    workers: int
    shards: int
    leaf_s: float
    every_s: float
    duration_s: float
    baseline_s: float
    faults: tuple[str, ...]
    reach_percent: float
    checkpoint_every: int


FOUR = Scenario(
    name="goodput_4_workers",
    what="goodput, one fault every 5 s, 4 workers; half `kill -9`, a quarter SIGSTOP for 4 s, "
    "an eighth 10 × slow, an eighth control or aggregator `kill -9`",
    workers=4,
    shards=9,
    leaf_s=0.1,
    every_s=5.0,
    duration_s=90.0,
    baseline_s=10.0,
    faults=(),
    reach_percent=90.0,
    checkpoint_every=5,
)
STEP_OVER_LEAVES = 1.05
START_TIMEOUT_S = 300.0
QUICK_S = 20.0


def run(command: str, *, quick: bool) -> list[Row]:
    """Goodput and equality of bits, 4 workers."""
    return measure(FOUR, command, quick=quick)


def measure(scenario: Scenario, command: str, *, quick: bool) -> list[Row]:
    """Disturb one cluster; goodput and whether the bits are those of an undisturbed run."""
    duration_s = max(QUICK_S, scenario.every_s) if quick else scenario.duration_s
    baseline_s = QUICK_S / 2 if quick else scenario.baseline_s
    rounds = -(-scenario.shards // scenario.workers)
    # Enough for the time it takes without any fault: a step takes a little longer than its leaves.
    steps = round((duration_s + 2 * baseline_s) / (rounds * scenario.leaf_s * STEP_OVER_LEAVES))
    job = patient_job("goodput", scenario.shards, steps, checkpoint_every=scenario.checkpoint_every)
    with patient_cluster(
        scenario.workers, scenario.leaf_s, aggregators=2, timeout_s=START_TIMEOUT_S
    ) as running:
        handle = running.submit(job)
        options = ChaosOptions(
            mix=faults_named(scenario.faults),
            every_s=scenario.every_s,
            duration_s=duration_s,
            baseline_s=baseline_s,
            seed=1,
        )
        chaos = Chaos(running, handle, LocalVictims(running.state_dir), options, tell=print)
        chaos.run()
        handle.wait(timeout_s=GUARD_S)
        report = chaos.report()
    equal = report.parameters_sha256 == undisturbed_sha256(job)
    return _rows(scenario, report, command, equal=equal, quick=quick)


def _rows(
    scenario: Scenario, report: Report, command: str, *, equal: bool, quick: bool
) -> list[Row]:
    percent = 100 * (report.goodput or 0.0)
    trials = len(report.injuries)
    broken = (report.counters.examples_lost or 0) + (report.counters.examples_doubled or 0)
    made = Rows(command, quick)
    return [
        made.at_least(
            scenario.name,
            scenario.what,
            percent,
            "%",
            scenario.reach_percent,
            trials=trials,
            note=f"recovery p50 {report.recovery_p50_s:.2f} s, p99 {report.recovery_p99_s:.2f} s; "
            f"{report.steps_per_s:.2f} of {report.undisturbed_steps_per_s:.2f} steps/s; "
            f"{scenario.shards} leaves of {scenario.leaf_s:g} s per step, a checkpoint "
            f"every {scenario.checkpoint_every} steps",
        ),
        made.none(
            f"{scenario.name}_broken",
            "examples lost or doubled in that run, plus one if its final SHA-256 is not that "
            "of the undisturbed computation",
            broken + (not equal),
            trials=trials,
        ),
    ]
