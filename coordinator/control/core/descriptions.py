"""What workers found out about a job by building its model, and what follows from it."""

from __future__ import annotations

from coordinator.control.core import describing, ending, kinds, quarantine, terms, told
from coordinator.control.core.eligibility import group_of, needed_bytes, too_large
from coordinator.control.core.lifecycle import QUEUED
from coordinator.control.core.state import Core, Description, JobRuntime, Worker
from phalanx.layouts import ITEM_BYTES
from phalanx.tasks import runs_tasks
from phalanx.texts import number_of
from phalanx.training.best import METRIC_NOT_COMPUTED, missing_metric
from phalanx.v1 import coordination_service_pb2 as pb
from phalanx.v1.job_pb2 import Failure
from phalanx.v1.training_pb2 import Layout

DESCRIBE_ATTEMPTS_MAX = 3


def described(core: Core, job: JobRuntime, worker: Worker, message: pb.JobDescribed) -> None:
    """Take in what a worker found out about the job by building its model."""
    if worker.id not in job.describing or core.facts_of(job).state != QUEUED:
        return
    del job.describing[worker.id]
    found = told.description(message)
    kind = kinds.of_worker(core.facts_of(job), worker.hello)
    result = describing.result_of(found)
    answer = Description(worker.id, worker.hello.incarnation, kind, found, result)
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
    right = next((each for each in equal if each.kind.complete), equal[0])
    differing = describing.differing(job, right)
    job.descriptions.clear()
    job.describing.clear()
    _take(core, job, right)
    if not right.found.HasField("failure"):
        for each in differing:
            quarantine.described_otherwise(core, job, each, equal)


def _take(core: Core, job: JobRuntime, answer: Description) -> None:
    """Let the job be what was found out, if it can be computed at all."""
    found, facts = answer.found, core.facts_of(job)
    if found.HasField("failure"):
        if not _is_asked_elsewhere(core, job, answer):
            _fail(core, job, found.failure)
    elif not _is_usable(core, job, found.layout):
        text = f"{answer.worker_id} described a model without parameters or of an unknown dtype"
        ending.fail(core, job, "DESCRIBE_FAILED", text)
    elif missing := missing_metric(facts.spec, found.evaluation_sums):
        ending.fail(core, job, METRIC_NOT_COMPUTED, missing)
    else:
        job.describing.clear()
        job.undescribed.clear()
        job.described = found
        job.described_kind = answer.kind
        refusal = too_large(core, needed_bytes(facts, found.layout))
        if refusal is not None:
            ending.fail(core, job, refusal.reason, refusal.message)


def _is_asked_elsewhere(core: Core, job: JobRuntime, answer: Description) -> bool:
    """Whether a failure may be that of the one machine: a full disk, or a process that was killed.

    Those that verify have agreed on it already.
    """
    if describing.is_verified(core, job):
        return False
    failure = job.undescribed[answer.worker_id] = Failure()
    failure.CopyFrom(answer.found.failure)
    failure.worker_ids[:] = [answer.worker_id]
    others = describing.elsewhere(job, group_of(core, job))
    if not others or len(job.undescribed) >= DESCRIBE_ATTEMPTS_MAX:
        return False
    core.emit(
        "WORKER_INELIGIBLE",
        f"{answer.worker_id} cannot build the model: {failure.message}; another worker is asked",
        job_id=job.job_id,
        worker_id=answer.worker_id,
        details={"cause": "not_described", "code": failure.code},
    )
    return True


def _fail(core: Core, job: JobRuntime, failure: Failure) -> None:
    """End the job with what was said last, and everything that was said."""
    failures = [*job.undescribed.values()] or [failure]
    message = failure.message
    if len(failures) > 1:
        message += f" (it failed on {', '.join(sorted(job.undescribed))})"
    job.undescribed.clear()
    ending.fail(core, job, failure.code or "DESCRIBE_FAILED", message, failures)


def _is_usable(core: Core, job: JobRuntime, layout: Layout) -> bool:
    tasks = runs_tasks(core.facts_of(job).spec)
    return layout.element_count > 0 and (tasks or layout.dtype in ITEM_BYTES)
