"""Contributions that commit one by one count once, whoever is killed while they are under way."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from phalanx.data.checkpoint_parts import parse_part
from phalanx.sdk.job import Job
from phalanx.sdk.methods import LIST_CHECKPOINTS
from phalanx.sdk.verification import replay_log_of, verify_job
from phalanx.testing.arena import GUARD_S, Arena, arena, gated_job, stopped, wait_until
from phalanx.v1.storage_service_pb2 import CheckpointManifest, ListCheckpointsRequest

pytestmark = pytest.mark.slow

SHARDS = 11
STEPS = 60
ROWS = 800
PER_EPOCH = 3
"""Steps in which each of the 800 rows is used once."""

MODES: dict[str, dict[str, Any]] = {
    "asynchronous": {"asynchronous": {"delay_compensated": {}, "replay_log": True}},
    "stale": {"stale": {"bound": 2, "replay_log": True}},
}


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    with arena(tmp_path_factory.mktemp("gate"), 3) as ring:
        yield ring


def last_checkpoint(ring: Arena, job: Job) -> CheckpointManifest:
    answer = ring.cluster.backend.call(LIST_CHECKPOINTS, ListCheckpointsRequest(job_id=job.id))
    return next(each for each in answer.checkpoints if each.final)


def ledger_balances(ring: Arena, job: Job) -> None:
    """Each step of each shard is in the history that survived, once."""
    result = job.wait(timeout_s=GUARD_S)
    assert (result.steps, result.examples_lost, result.examples_doubled) == (STEPS, 0, 0)
    assert not result.bit_identical
    checkpoint = last_checkpoint(ring, job)
    state = json.loads(checkpoint.root_state)
    assert state["completed_steps"] == [STEPS] * SHARDS
    assert state["examples"] == ROWS * STEPS // PER_EPOCH


@pytest.mark.parametrize("mode", MODES)
def test_worker_aggregator_and_control_killed_in_the_middle_of_leaves(
    ring: Arena, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHALANX_TEST_GATE", str(ring.gate.folder))
    before = {kind: len(ring.events(kind)) for kind in ("WORKER_LOST", "STEPS_REPLAYED")}
    document = gated_job(steps=STEPS, evaluation={"every_steps": 20}, **MODES[mode])
    job = ring.submit(document)
    for step, victim in ((4, "worker"), (15, "aggregator-1"), (25, "control-1"), (35, "both")):
        caught = ring.caught_at(job, step)
        victims = [caught[0]] if victim == "worker" else [victim]
        if victim == "both":
            victims = [caught[-1], "aggregator-1"]
        for member in victims:
            ring.signal(member)
    ring.gate.release()
    ledger_balances(ring, job)
    assert len(ring.events("STEPS_REPLAYED")) > before["STEPS_REPLAYED"]
    log = replay_log_of(ring.cluster, job)
    assert log is not None
    shards = [log.commit(number)[0] for number in range(len(log))]
    assert np.bincount(shards).tolist() == [STEPS] * SHARDS
    assert max(n - log.commit(n)[1] for n in range(len(log))) > 0, "nothing was ever stale"
    verdict = verify_job(ring.cluster, job.id)
    assert verdict.equal
    assert verdict.balanced


def test_others_go_on_while_a_worker_is_stopped_and_its_shards_are_moved(ring: Arena) -> None:
    job = ring.submit(gated_job(steps=STEPS, asynchronous={}))
    victim = ring.cluster.process(ring.caught_at(job, 4)[0])
    with stopped(victim.pid):
        ring.gate.release()
        ledger_balances(ring, job)


def test_a_paused_job_goes_on_where_each_shard_was(ring: Arena) -> None:
    job = ring.submit(gated_job(steps=STEPS, stale={"bound": 3}))
    ring.caught_at(job, 5)
    job.pause()
    ring.gate.release()
    wait_until(lambda: job.refresh().state == "PAUSED", "the job to be paused")
    assert 5 <= job.progress.step < STEPS
    job.resume()
    ledger_balances(ring, job)


def test_the_log_is_in_the_checkpoint_only_where_it_was_asked_for(ring: Arena) -> None:
    job = ring.cluster.submit(gated_job(steps=STEPS, asynchronous={}))
    ledger_balances(ring, job)
    part = last_checkpoint(ring, job).parts[0]
    _, vectors = parse_part(ring.cluster.backend.get_blob(part.digest))
    assert set(vectors) == {"m", "v"}
