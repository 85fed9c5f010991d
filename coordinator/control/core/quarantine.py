"""Workers that computed something else than a majority of others: they get no work any more.

It is about one start of a worker, is journalled, and holds for every job. It ends when the worker
has left after a drain, or is there in another start: then somebody, or the machine below it, has
done something about it, and if not it is caught again.
"""

from __future__ import annotations

from coordinator.control.core import describing, hosting, incidents, kinds, terms
from coordinator.control.core.describing import WAITING
from coordinator.control.core.disagreement import (
    different_results,
    possible_cause,
    quarantined_workers,
)
from coordinator.control.core.state import Core, Description, JobRuntime, Worker
from phalanx.texts import number_of
from phalanx.v1 import coordination_service_pb2 as pb
from phalanx.v1.cluster_service_pb2 import Worker as WorkerView
from phalanx.v1.control_journal_pb2 import ControlRecord, WorkerQuarantined
from phalanx.v1.training_pb2 import TreeNode


def outvoted(core: Core, job: JobRuntime, message: pb.OutvotedWorker) -> None:
    """Take all work from a worker whose copy of a contribution was outvoted. Said often."""
    where = f"{_leaf(message.node, evaluation=message.evaluation)} at step {message.step}"
    reason = (
        f"its copy of {where} of job {job.job_id} has SHA-256 {message.sha256}, "
        f"and that of {', '.join(message.agreed)} {message.majority_sha256}"
    )
    _quarantine(core, job, message, reason)


def described_otherwise(
    core: Core, job: JobRuntime, answer: Description, majority: list[Description]
) -> None:
    """Take all work from a worker that described a job in another way than a majority did."""
    own, right = answer.found, majority[0].found
    what, hashes = "first leaf", (own.leaf_sha256, right.leaf_sha256)
    if own.leaf_sha256 == right.leaf_sha256:
        what, hashes = "description", (describing.sha256_of(own), describing.sha256_of(right))
    agreed = sorted(each.worker_id for each in majority)
    reason = (
        f"its {what} of job {job.job_id} has SHA-256 {hashes[0]}, "
        f"and that of {', '.join(agreed)} {hashes[1]}"
    )
    message = _outvoted_by_description(answer.worker_id, answer.incarnation, *hashes)
    message.agreed.extend(agreed)
    _quarantine(core, job, message, reason)


def set_up_otherwise(core: Core, job: JobRuntime, worker: Worker, leaf_sha256: str) -> None:
    """Take a job from a worker whose own leaf is another one than the job is measured by.

    It takes no part in that job. If as many workers as have to agree have described that leaf, and
    it surely gives the same bits as these, it gets no work of any job: nobody asked it then, so it
    was not outvoted.
    A job that goes on from another one has the leaf of that one, which may be one worker's word.
    """
    facts = core.facts_of(job)
    agreed_on = describing.is_verified(core, job) and facts.continued is None
    wanted = kinds.of_plan(facts, facts.plan)
    alike = wanted is not None and wanted.is_surely(kinds.of_worker(facts, worker.hello))
    if leaf_sha256 and agreed_on and alike:
        hashes = leaf_sha256, facts.leaf_sha256
        reason = (
            f"its first leaf of job {job.job_id} has SHA-256 {hashes[0]}, "
            f"and that of the workers that described the job {hashes[1]}"
        )
        message = _outvoted_by_description(worker.id, worker.hello.incarnation, *hashes)
        _quarantine(core, job, message, reason)
    hosting.leave_out(core, job, worker.id, leaf_sha256)


def recall(core: Core, worker: Worker) -> None:
    """A worker is here: its quarantine survives a restart of control, but not one of its own."""
    fact = core.facts.quarantines.get(worker.id)
    if fact is None:
        return
    if fact.incarnation != worker.hello.incarnation:
        end(core, worker.id)
    elif worker.state == WorkerView.STATE_READY:
        worker.state, worker.reason = WorkerView.STATE_QUARANTINED, fact.reason


def end(core: Core, worker_id: str) -> None:
    """Forget it."""
    if worker_id in core.facts.quarantines:
        done = WorkerQuarantined(worker_id=worker_id, done=True)
        core.persist(ControlRecord(worker_quarantined=done))


def watch_verifiers(core: Core, job: JobRuntime, report: pb.JobReport) -> None:
    """Say why a job stands still that has workers, but too few to compare what they compute."""
    missing = report.verifiers_missing
    if not report.HasField("verifiers_missing") or not job.hosts:
        if job.reason == WAITING:
            core.set_reason(job, "")
        return
    if job.reason not in ("", WAITING):
        return  # something else is to be done first
    what = _leaf(missing.node, evaluation=missing.evaluation)
    more = "" if missing.leaves == 1 else f" (and {missing.leaves - 1} more)"
    came = f"{number_of(missing.copies, 'copy', 'copies')} of it came"
    came += different_results(missing.results)
    message = (
        f"{number_of(missing.needed, 'worker')} have to agree on {what} of step "
        f"{missing.step}{more}: {came}, and there is no other worker that delivers; add workers"
    )
    message += possible_cause(missing.results) + quarantined_workers(core)
    core.set_reason(job, WAITING, message)


def _outvoted_by_description(
    worker_id: str, incarnation: str, sha256: str, majority_sha256: str
) -> pb.OutvotedWorker:
    leaf = TreeNode(first=0, span=1)  # the one that a job is described with
    return pb.OutvotedWorker(
        worker_id=worker_id,
        incarnation=incarnation,
        node=leaf,
        sha256=sha256,
        majority_sha256=majority_sha256,
    )


def _quarantine(core: Core, job: JobRuntime, message: pb.OutvotedWorker, reason: str) -> None:
    known = core.facts.quarantines.get(message.worker_id)
    worker = core.workers.get(message.worker_id)
    if known is not None and known.incarnation == message.incarnation:
        return
    if worker is not None and worker.hello.incarnation != message.incarnation:
        return  # that start of it is gone
    fact = WorkerQuarantined(
        worker_id=message.worker_id, incarnation=message.incarnation, reason=reason
    )
    after = core.persist(ControlRecord(worker_quarantined=fact))
    core.emit(
        "WORKER_QUARANTINED",
        f"{message.worker_id} gets no work any more: {reason}",
        job_id=job.job_id,
        after=max(after, job.term_after),
        worker_id=message.worker_id,
        incident_id=incidents.suspected(core, message.worker_id),
        shard=message.node.first,
        step=message.step,
        details={
            "incarnation": message.incarnation,
            "shards": message.node.span,
            "evaluation": str(message.evaluation).lower(),
            "sha256": message.sha256,
            "majority_sha256": message.majority_sha256,
            "agreed": ",".join(message.agreed),
        },
    )
    if worker is not None and worker.connected:
        _take_all(core, worker, reason)
    for each in list(core.jobs.values()):
        if message.worker_id in each.descriptions:
            describing.forget(each, message.worker_id)
            terms.advance(core, each)


def _take_all(core: Core, worker: Worker, reason: str) -> None:
    if worker.state == WorkerView.STATE_DRAINING:
        return  # it has nothing of its own any more, and leaves
    worker.state, worker.reason = WorkerView.STATE_QUARANTINED, reason
    for job in core.running():
        hosting.take_away(core, job, worker.id, "the worker is quarantined", "quarantine")
    for job in list(core.jobs.values()):
        if worker.id in job.describing:
            terms.describing_worker_gone(core, job, worker.id)


def _leaf(node: TreeNode, *, evaluation: bool) -> str:
    kind = "evaluation shard" if evaluation else "shard"
    if node.span == 1:
        return f"{kind} {node.first}"
    return f"{kind}s {node.first} to {node.first + node.span - 1}"
