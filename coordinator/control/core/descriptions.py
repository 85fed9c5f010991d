"""What workers found out about a job by building its model, and what follows from it."""

from __future__ import annotations

from coordinator.control.core import describing, ending, quarantine, terms
from coordinator.control.core.eligibility import needed_bytes, too_large
from coordinator.control.core.lifecycle import QUEUED
from coordinator.control.core.state import Core, Description, JobRuntime, Worker
from phalanx.tasks import is_task_set
from phalanx.texts import number_of
from phalanx.training.best import METRIC_NOT_COMPUTED, missing_metric
from phalanx.v1 import coordination_service_pb2 as pb
from phalanx.v1.training_pb2 import Layout

DESCRIBE_ATTEMPTS_MAX = 3
DTYPE_BYTES = {"float32": 4, "float64": 8}


def described(core: Core, job: JobRuntime, worker: Worker, message: pb.JobDescribed) -> None:
    """Take in what a worker found out about the job by building its model."""
    if worker.id not in job.describing or core.facts_of(job).state != QUEUED:
        return
    del job.describing[worker.id]
    answer = Description(worker.id, worker.hello.incarnation, worker.hello.fingerprint, message)
    if describing.is_verified(core, job):
        _compare(core, job, answer)
    else:
        _take(core, job, answer)
    terms.advance(core, job)


def check_deadline(core: Core, job: JobRuntime) -> None:
    """Ask another worker if one takes too long; after a few the job fails."""
    late = [key for key, due_s in job.describing.items() if core.now.monotonic_s >= due_s]
    if not late:
        if describing.slow(core, job):
            terms.advance(core, job)
        return
    for worker_id in late:
        del job.describing[worker_id]
        job.describe_attempts += 1
        job.late_describers.add(worker_id)
    # Of a job that is verified fewer workers than may lie together cannot say that it hangs.
    many = len(job.late_describers) >= describing.needed(core, job)
    if job.describe_attempts >= DESCRIBE_ATTEMPTS_MAX and many:
        text = (
            f"{number_of(job.describe_attempts, 'worker')} did not build the model within "
            f"{core.config.describe_timeout_s:g} s each, the last was {late[-1]}"
        )
        ending.fail(core, job, "DESCRIBE_TIMEOUT", text)
    terms.advance(core, job)


def _compare(core: Core, job: JobRuntime, answer: Description) -> None:
    """Wait until enough workers say the same; whoever said something else then has lied."""
    job.descriptions[answer.worker_id] = answer
    equal = describing.agreed(core, job)
    if not equal:
        return
    differing = describing.differing(job, equal[0])
    job.descriptions.clear()
    job.describing.clear()
    _take(core, job, equal[0])
    if not equal[0].found.HasField("failure"):
        for each in differing:
            quarantine.described_otherwise(core, job, each, equal)


def _take(core: Core, job: JobRuntime, answer: Description) -> None:
    """Let the job be what was found out, if it can be computed at all."""
    found, facts = answer.found, core.facts_of(job)
    if found.HasField("failure"):
        failure = found.failure
        ending.fail(core, job, failure.code or "DESCRIBE_FAILED", failure.message, [failure])
    elif not _is_usable(core, job, found.layout):
        text = f"{answer.worker_id} described a model without parameters or of an unknown dtype"
        ending.fail(core, job, "DESCRIBE_FAILED", text)
    elif missing := missing_metric(facts.spec, found.evaluation_sums):
        ending.fail(core, job, METRIC_NOT_COMPUTED, missing)
    else:
        job.describing.clear()
        job.described = found
        job.described_fingerprint = answer.fingerprint
        refusal = too_large(core, needed_bytes(facts, found.layout))
        if refusal is not None:
            ending.fail(core, job, refusal.reason, refusal.message)


def _is_usable(core: Core, job: JobRuntime, layout: Layout) -> bool:
    tasks = is_task_set(core.facts_of(job).spec)
    return layout.element_count > 0 and (tasks or layout.dtype in DTYPE_BYTES)
