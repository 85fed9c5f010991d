"""Verifying a program of tasks: its results are counted, and all of them made again here."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from phalanx.errors import FailedPrecondition
from phalanx.sdk.verdict import TaskLedger, Verdict

if TYPE_CHECKING:
    from phalanx.sdk.job import Job
    from phalanx.sdk.values import Result
    from phalanx.v1.task_service_pb2 import TaskResult
    from phalanx.v1.training_pb2 import JobPlan

Fetch = Callable[[str], Path]


def verify_program(
    job: Job,
    result: Result,
    plan: JobPlan,
    ledger: TaskLedger,
    outcome_sha256: str,
    fetcher: Callable[[Path], Fetch],
) -> Verdict:
    """Run all tasks in this process and compare what they leave.

    Where there is a model its parameters are compared, else the outcome, which names every file by
    its hash. `fetcher` brings blobs into a folder.
    """
    wanted, found, why = result.parameters_sha256 or outcome_sha256, "", ""
    with tempfile.TemporaryDirectory(prefix="phalanx-verify-") as name:
        try:
            found = _computed(job, plan, Path(name), fetcher(Path(name)))
        except FailedPrecondition as error:
            why = error.message  # something is not installed here
    if found and found != wanted and not result.bit_identical:
        why = "its workers may have had different numeric fingerprints, and other bits came out"
    return Verdict(
        job_id=job.id,
        steps=result.steps,
        cluster_sha256=wanted,
        local_sha256=found,
        bit_identical=result.bit_identical,
        tasks=ledger,
        not_compared=why,
    )


def _computed(job: Job, plan: JobPlan, folder: Path, fetch: Fetch) -> str:
    from phalanx.sdk.in_process import job_code
    from phalanx.sdk.in_process_programs import Blobs, run_program, vector_of

    def put(data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        (folder / digest).write_bytes(data)
        return digest

    results: dict[int, TaskResult] = {}
    code = job_code(job.message.spec, fetch, folder / "code")
    blobs = Blobs(fetch, put)
    outcome = run_program(plan, blobs, results, lambda: None, code, goes_on=False)
    if outcome.model is not None:
        return vector_of(outcome.model, fetch)[1]
    return results[len(results) - 1].stored.digest
