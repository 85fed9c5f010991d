"""Every way of training balances its ledger whoever is killed in the middle of its leaves.

A cluster for each; the gate is held from before the job to the last kill: leaves pass by numbers.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from phalanx.sdk.job import Job
from phalanx.sdk.methods import LIST_CHECKPOINTS
from phalanx.sdk.values import Result
from phalanx.sdk.verdict import Verdict
from phalanx.sdk.verification import verify_job
from phalanx.testing.arena import (
    GUARD_S,
    Arena,
    arena,
    gated_job,
    undisturbed_sha256_of,
    wait_until,
)
from phalanx.v1.storage_service_pb2 import ListCheckpointsRequest

pytestmark = pytest.mark.slow

WORKERS = 3
SHARDS = 11
ROWS = 800
PER_EPOCH = 3
"""Steps in which each of the 800 rows is used once."""

STEPS = 7 * PER_EPOCH
KILLS = ((3, "worker"), (7, "aggregator-1"), (11, "storage"), (15, "control-1"))
"""Control comes last: one that was just started shows an earlier step for a moment, and as many
leaves as are missing from there would be let pass."""

NESTEROV = {"sgd": {"learning_rate": 0.7, "momentum": 0.9, "nesterov": True}}
LOCAL_STEPS = 2


@dataclass(frozen=True)
class Mode:
    """What a job says under `train`, and what can be asked of it after the kills."""

    train: dict[str, Any]
    same_bits: bool = True
    replayed: bool = False
    """Whether a log tells how to compute the same bits again."""
    one_by_one: bool = False
    leaves_out: bool = False
    own_steps: int = 1
    top: dict[str, Any] = field(default_factory=dict)


MODES = {
    "backups": Mode(
        {"synchronous": {"backup_shards": 2}},
        same_bits=False,
        replayed=True,
        leaves_out=True,
        top={"reproducibility": {"tolerant": {}}},
    ),
    "asynchronous": Mode(
        {"asynchronous": {"replay_log": True}}, same_bits=False, replayed=True, one_by_one=True
    ),
    "asynchronous with barrier": Mode(
        {"asynchronous": {"plain": {}, "barrier_every_clocks": 5, "replay_log": True}},
        same_bits=False,
        replayed=True,
        one_by_one=True,
    ),
    "asynchronous without log": Mode({"asynchronous": {}}, same_bits=False, one_by_one=True),
    "stale": Mode(
        {"stale": {"bound": 2, "replay_log": True}}, same_bits=False, replayed=True, one_by_one=True
    ),
    "local SGD": Mode(
        {"local": {"steps": LOCAL_STEPS}, "optimizer": {"sgd": {"learning_rate": 0.01}}},
        own_steps=LOCAL_STEPS,
    ),
    "local Adam": Mode({"local": {"steps": LOCAL_STEPS, "outer": NESTEROV}}, own_steps=LOCAL_STEPS),
    "top-k": Mode({"compression": {"top_k": {"fraction": 0.1}}}),
    "Krum": Mode({"reduction": {"krum": {"faulty": 2, "keep": 5}}}),
    "verified": Mode({"verification": {"replicas": 3}}),
    "all-reduce": Mode({"all_reduce": {}}),
}


def document_of(mode: Mode) -> dict[str, Any]:
    often = {"evaluation": {"every_steps": 6}, "checkpoints": {"every_steps": 5}}
    return {**gated_job(steps=STEPS, shards=SHARDS, **often, **mode.train), **mode.top}


def kill(ring: Arena, job: Job, step: int, who: str) -> None:
    """Kill one process while leaves are open, and wait until it was started again."""
    caught = ring.caught_at(job, step)
    victim = caught[0] if who == "worker" else who
    wait_until(lambda: ring.cluster.process(victim).pid, f"{victim} to be up")
    before = ring.cluster.process(victim)
    ring.signal(victim)
    wait_until(
        lambda: (
            ring.cluster.process(victim).restarts > before.restarts
            and ring.cluster.process(victim).pid
        ),
        f"another {victim}",
    )


def ledger_balances(ring: Arena, job: Job, mode: Mode, result: Result) -> None:
    """Every row of every step was used once, or is told as left out."""
    request = ListCheckpointsRequest(job_id=job.id)
    checkpoints = ring.cluster.backend.call(LIST_CHECKPOINTS, request).checkpoints
    state = json.loads(next(each for each in checkpoints if each.final).root_state)
    used = ROWS * STEPS // PER_EPOCH * mode.own_steps
    assert result.steps == STEPS
    assert result.examples_doubled == 0
    assert state["examples"] + result.examples_lost == used
    if not mode.leaves_out:
        assert result.examples_lost == 0
    if mode.one_by_one:
        assert state["completed_steps"] == [STEPS] * SHARDS


def proved(verdict: Verdict, mode: Mode) -> None:
    """The job's records account for every example, and where bits can come out again they do."""
    ledger = verdict.ledger
    assert ledger is not None
    assert ledger.problems == ()
    assert ledger.epochs == STEPS * mode.own_steps // PER_EPOCH
    assert (ledger.doubled, ledger.missing) == (0, 0)
    if mode.leaves_out:
        assert sum(each.examples for each in ledger.named) == ledger.left_out > 0
    else:
        assert ledger.exact_epochs == ledger.epochs
        assert (ledger.used, ledger.left_out) == (ROWS * ledger.epochs, 0)
    assert verdict.equal == verdict.compared == (mode.same_bits or mode.replayed)


@pytest.mark.same_bits
@pytest.mark.parametrize("name", MODES)
def test_worker_aggregator_control_and_storage_killed_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    mode = MODES[name]
    document = document_of(mode)
    monkeypatch.setenv("PHALANX_TEST_GATE", str(tmp_path))
    with arena(tmp_path, WORKERS) as ring:
        job = ring.submit(document)
        for step, who in KILLS:
            kill(ring, job, step, who)
        ring.gate.release()
        result = job.wait(timeout_s=GUARD_S)
        ledger_balances(ring, job, mode, result)
        assert result.bit_identical == mode.same_bits
        assert ring.events("WORKER_LOST")
        if name == "all-reduce":
            assert not ring.events("STEPS_REPLAYED"), "it has no use for an aggregator"
        else:
            assert ring.events("AGGREGATOR_LOST")
        proved(verify_job(ring.cluster, job.id), mode)
    if mode.same_bits:
        assert result.parameters_sha256 == undisturbed_sha256_of(document, tmp_path)
