"""Having workers build a job's model: whom to ask, and what their answers come to.

Only a worker can tell what the job's own code makes of it. One is believed, unless the job is
verified: the layout, the evaluation sums and the leaf that everybody is measured by are taken from
nobody's word there, but from as many workers as must agree on a contribution.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from coordinator.control.core import hosting
from coordinator.control.core.disagreement import (
    different_results,
    possible_cause,
    quarantined,
    quarantined_workers,
)
from coordinator.control.core.eligibility import Group
from coordinator.control.core.kinds import Kind
from coordinator.control.core.state import Core, Description, JobRuntime, Worker
from phalanx.messages import known
from phalanx.specs.parts import equal_copies, verifies
from phalanx.texts import number_of
from phalanx.v1 import coordination_service_pb2 as pb

WAITING = "WAITING_FOR_VERIFIERS"
SLOW_S = 10.0
"""Who has not answered after that may hang: another worker is asked besides. Most models are built
within a second, and those whose libraries take longer to import are worth building twice."""


def is_verified(core: Core, job: JobRuntime) -> bool:
    """Whether several workers have to agree on what the job is."""
    return verifies(core.facts_of(job).spec.train)


def needed(core: Core, job: JobRuntime) -> int:
    """Return how many workers have to agree."""
    return equal_copies(core.facts_of(job).spec.train) if is_verified(core, job) else 1


def ask(core: Core, job: JobRuntime, group: Group) -> None:
    """Ask as many workers as may still be needed; say so if there are too few."""
    if is_verified(core, job):
        _ask_several(core, job, group)
    elif not job.describing:
        core.set_reason(job, "DESCRIBING")
        ordered = _least_busy_first(core, elsewhere(job, group) or group.workers)
        _ask(core, job, ordered[job.describe_attempts % len(ordered)])
    elif len(slow(core, job)) == len(job.describing):
        others = [each for each in elsewhere(job, group) if each.id not in job.describing]
        for worker in _least_busy_first(core, others)[: _room(core, job, group)]:
            _ask(core, job, worker)


def elsewhere(job: JobRuntime, group: Group) -> list[Worker]:
    """Return the workers on which building the model has not failed."""
    return [worker for worker in group.workers if worker.id not in job.undescribed]


def slow(core: Core, job: JobRuntime) -> list[str]:
    """Return who was asked so long ago that others are asked besides."""
    asked_s = core.now.monotonic_s + core.config.describe_timeout_s - SLOW_S
    return [worker_id for worker_id, due_s in job.describing.items() if due_s <= asked_s]


def agreed(core: Core, job: JobRuntime) -> list[Description]:
    """Return the equal answers of enough workers of one kind, the first one first; empty: not yet.

    Who knows nothing of its own kind counts with each, but has nobody count who is of another.
    """
    for kind in dict.fromkeys(each.kind for each in job.descriptions.values()):
        for answers in _by_result(job, kind).values():
            if len(answers) >= needed(core, job) and (kind.complete or _alike(answers)):
                return answers
    return []


def differing(job: JobRuntime, right: Description) -> list[Description]:
    """Return the answers that workers which surely give the same bits should not have given.

    Who says that it fails there may be right: the machine may be too small, or lack something.
    """
    return [
        each
        for each in job.descriptions.values()
        if each.kind.is_surely(right.kind)
        and not each.found.HasField("failure")
        and each.result != right.result
    ]


def result_of(found: pb.JobDescribed) -> str:
    """Return what is compared of a description: of failures no text, which may name what is
    different in each process."""
    return found.failure.code if found.HasField("failure") else sha256_of(found)


def sha256_of(found: pb.JobDescribed) -> str:
    """Return the hash of everything that has to be equal in two descriptions."""
    bare = pb.JobDescribed(
        layout=found.layout, evaluation_sums=found.evaluation_sums, leaf_sha256=found.leaf_sha256
    )
    return hashlib.sha256(known(bare).SerializeToString(deterministic=True)).hexdigest()


def forget(job: JobRuntime, worker_id: str) -> None:
    """What a worker has answered, or not, does not count any more: it began anew, or has lied."""
    job.descriptions.pop(worker_id, None)
    job.undescribed.pop(worker_id, None)
    job.late_describers.discard(worker_id)


def _least_busy_first(core: Core, workers: Iterable[Worker]) -> list[Worker]:
    def busy(worker: Worker) -> tuple[int, int, str]:
        hosted = sum(worker.id in each.hosts for each in core.jobs.values())
        return hosted, -worker.slots, worker.id

    return sorted(workers, key=busy)


def _ask_several(core: Core, job: JobRuntime, group: Group) -> None:
    """Ask those that were not asked before, and whoever did not answer in time last."""
    equal = [len(answers) for answers in _by_result(job, group.kind).values()]
    waited_for = job.describing.keys() - set(slow(core, job))
    owed = sum(worker.id in waited_for for worker in group.workers)
    lacking = needed(core, job) - max(equal, default=0) - owed
    fresh = [
        worker
        for worker in _least_busy_first(core, group.workers)
        if worker.id not in job.descriptions and worker.id not in job.describing
    ]
    fresh.sort(key=lambda worker: worker.id in job.late_describers)
    for worker in fresh[: max(0, min(lacking, _room(core, job, group)))]:
        _ask(core, job, worker)
    if job.describing:
        core.set_reason(job, "DESCRIBING")
    else:
        core.set_reason(job, WAITING, _explain(core, job, group))


def _room(core: Core, job: JobRuntime, group: Group) -> int:
    """Return how many more may be asked: code that hangs must not take every worker with it."""
    asked = sum(worker.id in job.describing for worker in group.workers)
    return max(0, 2 * needed(core, job) - asked)


def _ask(core: Core, job: JobRuntime, worker: Worker) -> None:
    job.describing[worker.id] = core.now.monotonic_s + core.config.describe_timeout_s
    message = pb.DescribeJob(plan=hosting.job_plan(core, job))
    core.send(worker.session, pb.SessionResponse(describe_job=message), job.after)


def _explain(core: Core, job: JobRuntime, group: Group) -> str:
    """Say who has answered what, and who does not."""
    answers = [each for each in job.descriptions.values() if _counts(each, group.kind)]
    results = {(each.kind.fingerprint, each.result): each for each in answers}
    came = f"{number_of(len(answers), 'description')} of it came"
    if answers:
        came += f", from {', '.join(sorted(each.worker_id for each in answers))}"
    came += different_results(len(results))
    message = (
        f"{number_of(needed(core, job), 'worker')} have to agree on what the job is before it "
        f"begins (layout, evaluation sums and its first leaf): {came}, and there is no other "
        "worker to ask; add workers"
    )
    message += possible_cause(len(results))
    for each in results.values():
        if each.found.HasField("failure"):
            message += f"; it fails on {each.worker_id}: {each.found.failure.message}"
    message += quarantined_workers(core)
    others = sorted(group.excluded.keys() - set(quarantined(core)))
    if others:
        more = f" (and {len(others) - 1} more)" if len(others) > 1 else ""
        message += f"; {others[0]} is left out: {group.excluded[others[0]]}{more}"
    return message


def _by_result(job: JobRuntime, kind: Kind | None) -> dict[tuple[str, str], list[Description]]:
    """Return the answers of a kind that are equal, in the order in which they came."""
    results: dict[tuple[str, str], list[Description]] = {}
    for each in job.descriptions.values():
        if _counts(each, kind):
            results.setdefault((each.kind.fingerprint, each.result), []).append(each)
    return results


def _counts(answer: Description, kind: Kind | None) -> bool:
    return kind is None or kind.may_be(answer.kind)


def _alike(answers: list[Description]) -> bool:
    return all(one.kind.may_be(other.kind) for one in answers for other in answers)
