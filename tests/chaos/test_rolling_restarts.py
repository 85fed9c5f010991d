"""Every service is replaced, one after another, under a running job and a client that calls."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from phalanx.testing.arena import GUARD_S, Arena, arena, gated_job, wait_until
from phalanx.testing.calling import Callers

pytestmark = [
    pytest.mark.slow,
    pytest.mark.same_bits,
    # A list that says that it may lack something, while storage is away, is an answer.
    pytest.mark.filterwarnings("ignore::phalanx.errors.IncompleteWarning"),
]

WORKERS = 3
IN_ORDER = ("storage", "control-1", "control-2", "aggregator-1", "aggregator-2", "workers")
"""The order in which the handbook upgrades a cluster."""


@pytest.mark.parametrize(
    ("number", "secure", "order"),
    [
        (signal.SIGTERM, True, IN_ORDER),
        pytest.param(signal.SIGKILL, False, IN_ORDER[::-1], marks=pytest.mark.soak),
    ],
    ids=["drained, with keys", "killed, the other way round"],
)
def test_all_services_are_replaced_and_no_call_fails(
    tmp_path: Path,
    long_job: dict[str, Any],
    long_sha256: str,
    number: int,
    secure: bool,
    order: tuple[str, ...],
) -> None:
    with arena(tmp_path, WORKERS, controls=2, aggregators=2, leaf_s=0.15, secure=secure) as ring:
        ring.workers_ready()
        job = ring.cluster.submit(long_job)
        ring.at_step(job, 2)
        with Callers(ring.cluster, job.id, gated_job(steps=2)) as callers:
            for name in order:
                for member in _workers(ring) if name == "workers" else [name]:
                    _replace(ring, member, number, callers)
                    step = job.refresh().progress.step
                    wait_until(lambda s=step: job.refresh().progress.step != s or job.done, "steps")
            assert not job.done, "the job was over before everything had been replaced"
            ring.hurry()
            result = job.wait(timeout_s=GUARD_S)
            small = callers.finish()
    assert callers.failures == []
    assert all(count > WORKERS for count in callers.calls.values()), callers.calls
    assert result.parameters_sha256 == long_sha256
    assert (result.examples_lost, result.examples_doubled) == (0, 0)
    assert len(small) >= len(order)
    assert len({each.parameters_sha256 for each in small}) == 1


def _workers(ring: Arena) -> list[str]:
    return [each.id for each in ring.cluster.processes() if each.role == "worker"]


def _replace(ring: Arena, member_id: str, number: int, callers: Callers) -> None:
    """End one process, and wait until there is another one that does its work."""
    before = ring.cluster.process(member_id)
    workers = len(_workers(ring))
    ring.signal(member_id, number)
    callers.next_round()
    if before.role == "worker" and number == signal.SIGTERM:
        wait_until(lambda: member_id not in _workers(ring), "the drained worker to leave")
        ring.cluster.add_worker()
        assert len(_workers(ring)) == workers
    else:

        def is_back() -> bool:
            now = ring.cluster.process(member_id)
            return bool(now.address or now.role == "worker") and now.pid not in (0, before.pid)

        wait_until(is_back, f"{member_id} to be started anew")
    ring.workers_ready()
