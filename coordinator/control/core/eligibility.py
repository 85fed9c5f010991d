"""Which workers may host a job, and for each of the others why not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from coordinator.control.core import kinds, sharing
from coordinator.control.core.facts import JobFacts
from coordinator.control.core.kinds import Kind
from coordinator.control.core.state import Core, JobRuntime, Worker
from phalanx.errors import PhalanxError, ResourceExhausted
from phalanx.layouts import ITEM_BYTES
from phalanx.needs import lacking
from phalanx.specs.copies import PARAMETER_COPIES, TORCH_COPIES, member_copies
from phalanx.specs.parts import all_reduces, equal_copies
from phalanx.texts import number_of, verb_for
from phalanx.v1.cluster_service_pb2 import Worker as WorkerView
from phalanx.v1.training_pb2 import Layout

PREPARE_TRIES = 3
"""After so many tries a worker that cannot prepare a set of tasks is left out of it."""

TAKES_WORK = frozenset((WorkerView.STATE_READY, WorkerView.STATE_SUSPECTED))


@dataclass(frozen=True)
class Group:
    """Workers that may host a job; `excluded` says why each of the others may not."""

    kind: Kind | None
    """That all of them have, as far as it is known; None: any."""
    workers: tuple[Worker, ...]
    excluded: dict[str, str] = field(default_factory=dict)
    unmatched: tuple[str, ...] = ()
    """Those excluded by nothing but the bits that they give."""


def needed_bytes(facts: JobFacts, layout: Layout) -> int:
    """Return about how much memory a worker needs for a job.

    The plan of a model of the user's own counts no parameters: only a worker that has built the
    model knows them.
    """
    counted = facts.kept.submitted.worker_bytes
    kind = facts.spec.train.model.WhichOneof("kind")
    if kind in ("custom", "torch"):
        copies = PARAMETER_COPIES + member_copies(facts.spec)
        copies += TORCH_COPIES if kind == "torch" else 0
        counted += copies * layout.element_count * ITEM_BYTES.get(layout.dtype, 4)
    return counted


def too_large(core: Core, needed: int) -> PhalanxError | None:
    """A job that fits no worker that is there is refused; with none there it may wait for one."""
    there = [worker for worker in core.workers.values() if worker.connected]
    known = [worker for worker in there if worker.hello.memory_bytes > 0]
    if not known or len(known) < len(there):
        return None
    largest = max(worker.hello.memory_bytes for worker in known)
    if needed <= largest:
        return None
    return ResourceExhausted(
        f"each worker needs {needed} bytes for this job, and the largest of "
        f"{number_of(len(known), 'worker')} has {largest}; use a smaller model, "
        "batch_size or more shards",
        reason="JOB_TOO_LARGE",
        details={"worker_bytes": str(needed), "largest_worker_bytes": str(largest)},
    )


def misfit(facts: JobFacts, worker: Worker, layout: Layout | None = None) -> str:
    """Return why a worker cannot host a job whatever bits it gives; empty if it can.

    `layout` is that of a job whose first term has not begun, once a worker has described it.
    """
    hello, resources = worker.hello, facts.spec.resources
    for key, value in sorted(resources.worker_labels.items()):
        if hello.labels.get(key) != value:
            return f"its label {key} is not {value!r}"
    if all_reduces(facts.spec.train) and not hello.address:
        return "it tells no address at which other workers reach it"
    of_model = facts.kept.submitted.model_libraries
    lacks = lacking(facts.spec, of_model, hello.libraries) or _lacks_gpus(resources.gpus, worker)
    if lacks:
        return lacks
    needed = needed_bytes(facts, layout or facts.plan.layout)
    if 0 < hello.memory_bytes < needed:
        return f"it has {hello.memory_bytes} bytes of memory, the job needs {needed}"
    per_slot = hello.slot_memory_bytes or hello.memory_bytes // worker.slots
    wanted = max(resources.memory_bytes, needed if hello.slot_memory_bytes else 0)
    if 0 < per_slot < wanted:
        return f"a slot has {per_slot} bytes of memory, the job needs {wanted}"
    return ""


def _lacks_gpus(each: int, worker: Worker) -> str:
    """Say why a worker has not so many GPUs for each of its slots; empty if it has."""
    there, slots = worker.hello.gpus, worker.slots
    if each == 0 or there >= each * slots:
        return ""
    if there <= 0:
        return "it has no GPU"
    return (
        f"it has {number_of(there, 'GPU')} for {number_of(slots, 'slot')}, and the job needs "
        f"{each} for each (start it with fewer --slots)"
    )


def group_of(core: Core, job: JobRuntime) -> Group:
    """Return the workers that may host a job now.

    A reproducible job takes workers of one kind: the one it started with or was described on, else
    the best of those that are there, but none on which building its model has failed, or whose
    workers do not agree on it, as long as there is another.
    """
    facts = core.facts_of(job)
    fitting: list[Worker] = []
    excluded: dict[str, str] = {}
    for worker in core.workers.values():
        if worker.connected and worker.state == WorkerView.STATE_QUARANTINED:
            # Why names the job that found it out, which may be one of another namespace.
            excluded[worker.id] = "it is quarantined (`phalanx workers` says why)"
        if not worker.connected or worker.state not in TAKES_WORK:
            continue
        why = misfit(facts, worker, job.described.layout if job.described else None)
        why = why or _unprepared(job, worker)
        if why:
            excluded[worker.id] = why
        else:
            fitting.append(worker)
    if not facts.plan.bitwise:
        return Group(None, tuple(fitting), excluded)
    kind = kinds.of_plan(facts, facts.plan) or (job.described_kind if job.described else None)
    if kind is None:
        fresh = [worker for worker in fitting if worker.id not in job.undescribed]
        kind = _open_kind(facts, job, fresh or fitting)
    chosen: list[Worker] = []
    unmatched: list[str] = []
    for worker in fitting:
        if unlike := kinds.difference(kind, worker.hello):
            excluded[worker.id] = unlike
        elif facts.leaf_sha256 and worker.id in job.other_leaves:
            excluded[worker.id] = _other_leaf(facts.leaf_sha256, job.other_leaves[worker.id])
        else:
            chosen.append(worker)
            continue
        unmatched.append(worker.id)
    return Group(kind, tuple(chosen), excluded, tuple(unmatched))


def _open_kind(facts: JobFacts, job: JobRuntime, workers: Sequence[Worker]) -> Kind | None:
    """Return the kind for a job that has none yet; None: nobody is there."""
    left, first = list(workers), kinds.best(facts, [worker.hello for worker in workers])
    kind = first
    while kind is not None and _disagrees(facts, job, kind, workers):
        left = [worker for worker in left if kinds.difference(kind, worker.hello)]
        kind = kinds.best(facts, [worker.hello for worker in left])
    return kind or first


def _disagrees(facts: JobFacts, job: JobRuntime, kind: Kind, workers: Sequence[Worker]) -> bool:
    """Whether too few of a kind can agree any more on what the job is, whoever else is asked."""
    came = Counter(each.result for each in job.descriptions.values() if kind.may_be(each.kind))
    if not came:
        return False
    open_ = sum(
        worker.id not in job.descriptions and not kinds.difference(kind, worker.hello)
        for worker in workers
    )
    return open_ + max(came.values()) < equal_copies(facts.spec.train)


def may_come_back(core: Core, job: JobRuntime) -> bool:
    """Whether some worker that died might host the job if it came back."""
    facts, layout = core.facts_of(job), job.described.layout if job.described else None
    return any(
        worker.state == WorkerView.STATE_LOST
        and not misfit(facts, worker, layout)
        and not _unprepared(job, worker)
        for worker in core.workers.values()
    )


def _unprepared(job: JobRuntime, worker: Worker) -> str:
    known = job.unprepared.get(worker.id)
    # A process that was started again may find what the one before lacked.
    if known is None or known.incarnation != worker.hello.incarnation:
        return ""
    return f"it cannot prepare the job: {known.message}" if known.tries >= PREPARE_TRIES else ""


def _other_leaf(wanted: str, own: str) -> str:
    found = f"its own is {own}" if own else "it tells none, as it runs an older version"
    return (
        f"it gives other bits in this job: the leaf that the job began with is {wanted}, {found} "
        "(code that depends on more than its seed and its rows does so, too)"
    )


def choose_hosts(core: Core, job: JobRuntime, group: Group) -> dict[str, Worker]:
    """Return the workers of the group that host the job: those that do already, then those with the
    least to do for other jobs, then the largest.

    At most `max_workers`. A suspected worker keeps what it has and gets nothing new; one that was
    set aside gets nothing as long as there are others.
    """
    limit = core.facts_of(job).spec.resources.max_workers or len(group.workers)
    wanted = [
        worker
        for worker in group.workers
        if worker.id in job.hosts or worker.state == WorkerView.STATE_READY
    ]
    well = [worker for worker in wanted if worker.id not in job.set_aside]
    wanted = well or wanted
    crowded = _loads(core, job, wanted) if limit < len(wanted) else {}

    def last(worker: Worker) -> tuple[bool, float, int, str]:
        new = worker.id not in job.hosts
        return new, crowded.get(worker.id, 0.0), -worker.slots, worker.id

    wanted.sort(key=last)
    return {worker.id: worker for worker in sorted(wanted[:limit], key=lambda each: each.id)}


def _loads(core: Core, job: JobRuntime, workers: list[Worker]) -> dict[str, float]:
    others = [each for each in core.running() if each is not job]
    return {
        worker.id: sharing.load(
            worker.slots, (weight_of(core, each) for each in others if worker.id in each.hosts)
        )
        for worker in workers
    }


def weight_of(core: Core, job: JobRuntime) -> int:
    """Return how much of the slots a job gets, relative to others."""
    return sharing.weight(core.facts_of(job).spec.priority)


def explain_waiting(core: Core, job: JobRuntime, group: Group) -> tuple[str, str]:
    """Return (reason, message) for a job that has too few workers."""
    wanted = core.facts_of(job).spec.resources.min_workers
    if group.unmatched and not group.workers:
        first = group.unmatched[0]
        message = (
            f"no worker gives the bits that the job started with; {', '.join(group.unmatched)} "
            f"would give others ({first}: {group.excluded[first]}); set "
            "reproducibility.bitwise.fall_back_after to go on there"
        )
        return "WAITING_FOR_FINGERPRINT", message
    ready = sum(worker.state == WorkerView.STATE_READY for worker in group.workers)
    wanted = max(1, wanted)
    message = f"{ready} of {number_of(wanted, 'worker')} {verb_for(wanted, 'is', 'are')} there"
    if ready < len(group.workers):
        silent = len(group.workers) - ready
        message += (
            f", {silent} more {verb_for(silent, 'has', 'have')} not been heard of for a moment"
        )
    if group.excluded:
        worker_id, why = next(iter(sorted(group.excluded.items())))
        more = len(group.excluded) - 1
        message += f"; {worker_id} is left out: {why}" + (f" (and {more} more)" if more else "")
    if core.facts_of(job).kept.changed.pause_requested:
        message += "; it pauses at its next step, for which it needs a worker (or cancel it)"
    return "WAITING_FOR_WORKERS", message


def announce_ineligible(core: Core, job: JobRuntime, group: Group) -> None:
    """Tell once per job and worker that the bits which it gives keep it out, and why."""
    for worker in group.workers:
        job.told_ineligible.pop(worker.id, None)  # it was started again as another one
    for worker_id in group.unmatched:
        why = group.excluded[worker_id]
        if job.told_ineligible.get(worker_id) == why:
            continue
        job.told_ineligible[worker_id] = why
        core.emit(
            "WORKER_INELIGIBLE",
            f"{worker_id} does not take part: {why}",
            job_id=job.job_id,
            worker_id=worker_id,
            after=job.term_after,
            details={
                "fingerprint": core.workers[worker_id].hello.fingerprint,
                "leaf_sha256": job.other_leaves.get(worker_id, ""),
                "job_leaf_sha256": core.facts_of(job).leaf_sha256,
            },
        )
