"""Leaves that fail: tried elsewhere, then the shard is named and the job fails (or skips it).

A worker on which a set of tasks cannot even be prepared is left out of it after some tries; once
there is no other, the job fails and names it.

Only what a leaf's own process did counts. A worker's death never gets here. A worker tells a
failure again on each new session, as it cannot know what was heard; one computation counts once.
"""

from __future__ import annotations

from coordinator.control.core import ending, hosting, terms, told
from coordinator.control.core.eligibility import PREPARE_TRIES, group_of, may_come_back
from coordinator.control.core.lifecycle import RUNNING
from coordinator.control.core.state import Core, FailedLeaf, JobRuntime, Unprepared, Worker
from phalanx.model_failures import common
from phalanx.tasks import runs_tasks
from phalanx.texts import number_of
from phalanx.v1 import coordination_service_pb2 as pb
from phalanx.v1.job_pb2 import Failure

WORKERS_MAX = 2
ATTEMPTS_MAX = 3
CONFIRMATIONS = 2
"""Computations of a non-finite leaf before it is believed: the first and one elsewhere."""


def leaf_failed(core: Core, worker: Worker, message: pb.LeafFailed) -> None:
    """Count a failed leaf and decide: try elsewhere, skip the shard, or fail the job."""
    job = core.jobs.get(message.job_id)
    if job is None or job.ending is not None:
        return
    message.message, message.traceback = told.text(message.message), told.text(message.traceback)
    facts = core.facts_of(job)
    if runs_tasks(facts.spec):
        _not_prepared(core, job, worker, message)
        return
    tree = job.evaluation if message.evaluation else job.train
    if facts.state != RUNNING or facts.term != message.term or not 0 <= message.shard < tree.width:
        return
    failures = job.failed_leaves.setdefault((message.evaluation, message.shard), [])
    # Another step is another try: the shard got through in between.
    failures[:] = [each for each in failures if each.step == message.step]
    failed = FailedLeaf(
        worker.id,
        message.step,
        message.kind,
        message.message,
        message.traceback,
        message.first_row,
        message.row_count,
        worker.hello.incarnation,
        message.task,
        told.name(message.reason),
    )
    if not any(_same_computation(each, failed) for each in failures):
        failures.append(failed)
    elif tree.owners.get(message.shard) != worker.id:
        return  # somebody else has it already
    # Said again by the one who still has the shard: the answer to it may be lost, decide as before.
    if message.kind == pb.LeafFailed.KIND_NON_FINITE:
        _non_finite(core, job, message, failures)
    elif len({each.worker_id for each in failures}) >= WORKERS_MAX or len(failures) >= ATTEMPTS_MAX:
        _poisoned(core, job, message, failures)
    else:
        _try_elsewhere(core, job, message, failures)


def _not_prepared(core: Core, job: JobRuntime, worker: Worker, message: pb.LeafFailed) -> None:
    """Count a try to prepare a set of tasks; a worker that cannot is left out of it.

    With nobody left the job fails. Whoever is only away may come back, so a death ends nothing.
    """
    if core.facts_of(job).state != RUNNING or worker.id not in job.hosts:
        return
    known = job.unprepared.get(worker.id)
    if known is None or known.incarnation != worker.hello.incarnation:
        known = job.unprepared[worker.id] = Unprepared(worker.hello.incarnation)
    known.tries += 1
    known.message, known.traceback = message.message, message.traceback
    left_out = known.tries >= PREPARE_TRIES
    then = "it is left out" if left_out else "it tries again"
    core.emit(
        "WORKER_INELIGIBLE",
        f"{worker.id} cannot prepare the job: {known.message}; "
        f"{then} (try {known.tries} of {PREPARE_TRIES})",
        job_id=job.job_id,
        worker_id=worker.id,
        after=job.term_after,
        details={"cause": "not_prepared", "tries": known.tries},
    )
    if not left_out:
        return
    hosting.take_away(core, job, worker.id, "the worker cannot prepare the job", "not_prepared")
    if not group_of(core, job).workers and not may_come_back(core, job):
        _nobody_prepared(core, job)


def _nobody_prepared(core: Core, job: JobRuntime) -> None:
    failed = {key: each for key, each in job.unprepared.items() if each.tries >= PREPARE_TRIES}
    causes = "; ".join(f"{key}: {each.message}" for key, each in sorted(failed.items()))
    text = (
        f"no worker that is there can prepare the job, after {PREPARE_TRIES} tries each "
        f"({causes}); mend that, then: phalanx retry {job.job_id}"
    )
    failure = Failure(
        code="JOB_NOT_PREPARED",
        message=text,
        shard=-1,
        attempts=sum(each.tries for each in failed.values()),
        worker_ids=sorted(failed),
        traceback=next((each.traceback for each in failed.values() if each.traceback), ""),
    )
    ending.fail(core, job, "JOB_NOT_PREPARED", text, [failure])
    terms.advance(core, job)


def _same_computation(first: FailedLeaf, second: FailedLeaf) -> bool:
    """Whether the second report only repeats the first."""
    return second.task != 0 and (first.worker_id, first.incarnation, first.task) == (
        second.worker_id,
        second.incarnation,
        second.task,
    )


def _non_finite(
    core: Core, job: JobRuntime, message: pb.LeafFailed, failures: list[FailedLeaf]
) -> None:
    bad = [each for each in failures if each.kind == pb.LeafFailed.KIND_NON_FINITE]
    if len(bad) < CONFIRMATIONS:
        _try_elsewhere(core, job, message, failures)
        return
    action = core.facts_of(job).spec.train.on_nonfinite
    limit = action.skip.max_steps
    if action.WhichOneof("action") == "skip" and not message.evaluation:
        job.skipped_steps.add(message.step)
        if limit == 0 or len(job.skipped_steps) <= limit:
            _skip(core, job, message)
            return
    where = "evaluation shard" if message.evaluation else "shard"
    text = (
        f"the leaf of {where} {message.shard} at step {message.step} is not finite, twice; "
        "lower the learning rate or check the data"
    )
    failure = _failure(message, failures, "NON_FINITE", text)
    core.emit("NON_FINITE_REFUSED", text, job_id=job.job_id, shard=message.shard, step=message.step)
    ending.fail(core, job, "NON_FINITE", text, [failure])
    terms.advance(core, job)


def _skip(core: Core, job: JobRuntime, message: pb.LeafFailed) -> None:
    absent = pb.AbsentShards(
        job_id=job.job_id, term=message.term, step=message.step, shards=[message.shard]
    )
    # Where copies are compared, anybody may be asked for one.
    every = core.facts_of(job).plan.verified
    for worker_id in sorted(job.hosts):
        worker = core.workers[worker_id]
        if every or message.shard in job.hosts[worker_id].train:
            core.send(worker.session, pb.SessionResponse(absent_shards=absent), job.term_after)
    core.emit(
        "NON_FINITE_REFUSED",
        f"shard {message.shard} is left out of step {message.step}: its leaf is not finite",
        job_id=job.job_id,
        shard=message.shard,
        step=message.step,
        details={"skipped_steps": len(job.skipped_steps)},
    )


def _poisoned(
    core: Core, job: JobRuntime, message: pb.LeafFailed, failures: list[FailedLeaf]
) -> None:
    workers = sorted({each.worker_id for each in failures})
    kind = pb.LeafFailed.Kind.Name(message.kind).removeprefix("KIND_").lower().replace("_", " ")
    where = "evaluation shard" if message.evaluation else "shard"
    last = message.first_row + message.row_count - 1
    rows = f" (rows {message.first_row} to {last})" if message.row_count else ""
    text = (
        f"the leaf of {where} {message.shard}{rows} failed "
        f"{number_of(len(failures), 'time')} at step {message.step} on "
        f"{', '.join(workers)}: {kind}: {message.message}"
    )
    core.emit(
        "POISON_SHARD",
        text,
        job_id=job.job_id,
        worker_id=failures[-1].worker_id,
        shard=message.shard,
        step=message.step,
    )
    code = common(each.reason for each in failures) or "POISON_SHARD"
    ending.fail(core, job, code, text, [_failure(message, failures, code, text)])
    terms.advance(core, job)


def _try_elsewhere(
    core: Core, job: JobRuntime, message: pb.LeafFailed, failures: list[FailedLeaf]
) -> None:
    """Give the shard to a worker that has not failed at it, or again to the only one there is."""
    if job.all_reduce:  # shards stay where they are for a term
        core.observe("redispatches_total", 1, cause="leaf_failed")
        hosting.resend(core, job, failures[-1].worker_id)
        return
    tree = job.evaluation if message.evaluation else job.train
    failed = frozenset(each.worker_id for each in failures)
    before, freed = tree.owners.get(message.shard, ""), tree.unit_of(message.shard)
    for shard in freed:
        tree.owners.pop(shard, None)
        tree.keepers.pop(shard, None)
    hosting.sync(
        core,
        job,
        cause="leaf_failed",
        freed=() if message.evaluation else freed,
        freed_evaluation=freed if message.evaluation else (),
        avoided=failed,
    )
    after = tree.owners.get(message.shard, "")
    if after and after == before:
        core.observe("redispatches_total", 1, cause="leaf_failed")
        hosting.resend(core, job, after)


def _failure(message: pb.LeafFailed, failures: list[FailedLeaf], code: str, text: str) -> Failure:
    return Failure(
        code=code,
        message=text,
        shard=message.shard,
        first_row=message.first_row,
        row_count=message.row_count,
        step=message.step,
        attempts=len(failures),
        worker_ids=sorted({each.worker_id for each in failures}),
        traceback=next((each.traceback for each in reversed(failures) if each.traceback), ""),
    )
