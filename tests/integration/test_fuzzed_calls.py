"""Requests drawn from the descriptors, to every method of every service of a real cluster.

PHALANX_FUZZ_ROUNDS says how often each method is called in the long test (1,000 times),
PHALANX_FUZZ_SEED draws the requests: the same seed, the same requests.
"""

import asyncio
import contextlib
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from phalanx.errors import PhalanxError
from phalanx.testing.arena import (
    GUARD_S,
    Arena,
    add_blobs,
    arena,
    gated_job,
    unhurried_job,
    wait_until,
)
from tests.integration.fuzzed_calls import (
    TASKS,
    Fuzzing,
    all_methods,
    defects_in_logs,
    sizes,
)

MIB = 1024 * 1024
ROUNDS = int(os.environ.get("PHALANX_FUZZ_ROUNDS", "1000"))
SEED = int(os.environ.get("PHALANX_FUZZ_SEED", "0")) or random.randrange(1, 1_000_000)
GROWTH_LIMIT_BYTES = 48 * MIB
FILES_MORE = 24

Sizes = dict[str, tuple[int, int, int]]
"""By member: bytes of memory, open files, threads."""

pytestmark = pytest.mark.slow


@pytest.fixture
def ring(tmp_path: Path, loaded_code: None) -> Iterator[Arena]:
    """A cluster whose leaves take their time and little of the machine's."""
    with arena(tmp_path, 2, leaf_s=0.1, state=tmp_path / "state") as made:
        yield made


def endless_jobs(ring: Arena) -> list[str]:
    """One job of each kind of owner, all at work: ranges, workers among themselves, tasks."""
    ring.workers_ready()
    add_blobs(ring.cluster)
    ranges, among = unhurried_job(10**6), unhurried_job(10**6)
    among["train"]["all_reduce"] = {}
    jobs = [ring.cluster.submit(each) for each in (ranges, among)]
    for job in jobs:
        ring.at_step(job, 1)
    jobs.append(ring.cluster.submit(TASKS))
    return [job.id for job in jobs]


def at_work(ring: Arena, jobs: list[str]) -> bool:
    found = {job.id: job for job in ring.cluster.jobs()}
    return all(each in found and not found[each].done for each in jobs)


def forget_others(ring: Arena, keep: list[str]) -> None:
    """End the jobs that were drawn, or they would compute for ever."""
    for job in ring.cluster.jobs():
        if job.id not in keep and not job.done:
            try:
                job.cancel()
            except PhalanxError as error:
                if error.reason not in {"JOB_ENDED", "JOB_NOT_FOUND"}:
                    raise


def honest_job(ring: Arena) -> None:
    add_blobs(ring.cluster)  # who may call all methods may also have deleted it
    job = ring.cluster.submit(gated_job(steps=3) | {"name": "honest"})
    assert job.wait(timeout_s=GUARD_S).examples_lost == 0
    assert ring.cluster.models.describe("honest").job_id == job.id


def grown(before: Sizes, after: Sizes) -> list[str]:
    """Which members have more than they had while the same jobs were at work, and of what."""
    limits = (GROWTH_LIMIT_BYTES, FILES_MORE, FILES_MORE)
    return [
        f"{member}: {now:,} {what}, and before {old:,}"
        for member in before.keys() & after.keys()
        for what, limit, old, now in zip(
            ("bytes", "files", "threads"), limits, before[member], after[member], strict=True
        )
        if now - old >= limit
    ]


def fuzzed(ring: Arena, seed: int, requests: int, batches: int) -> Fuzzing:
    jobs = endless_jobs(ring)
    fuzzing = Fuzzing(ring, seed, jobs)
    before = sizes(ring)
    for batch in range(batches):
        asyncio.run(fuzzing.run(requests))
        forget_others(ring, jobs)
        if not at_work(ring, jobs):
            # What was drawn has ended one of them, or has deleted their data.
            forget_others(ring, [])
            jobs = endless_jobs(ring)
            fuzzing.knows(jobs)
        if batch == 0:
            before = sizes(ring)
    assert not fuzzing.wrong, f"seed {seed}: " + "\n".join(fuzzing.wrong[:20])
    assert {*fuzzing.answers} == {
        f"/{each.containing_service.full_name}/{each.name}" for each in all_methods()
    }
    assert defects_in_logs(ring.cluster.state_dir / "logs") == []
    # What was drawn last may be about to end.
    with contextlib.suppress(AssertionError):
        wait_until(lambda: not grown(before, sizes(ring)), "members as small as before")
    assert grown(before, sizes(ring)) == []
    forget_others(ring, [])
    honest_job(ring)
    return fuzzing


def test_whatever_is_sent_is_answered_and_costs_nothing(ring: Arena) -> None:
    fuzzing = fuzzed(ring, 4711, requests=6, batches=2)
    heard = {code for answers in fuzzing.answers.values() for code in answers}
    assert {"OK", "INVALID_ARGUMENT", "NOT_FOUND"} <= heard
    assert all(member.pid for member in ring.cluster.processes())


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_whatever_is_sent_for_long(ring: Arena, capsys: pytest.CaptureFixture[str]) -> None:
    fuzzing = fuzzed(ring, SEED, requests=20, batches=max(2, ROUNDS // 20))
    with capsys.disabled():
        print(f"\nseed {SEED}")
        for method, answers in sorted(fuzzing.answers.items()):
            print(f"{method}: {dict(answers.most_common())}")
