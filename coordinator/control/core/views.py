"""What people are shown: jobs, workers and aggregators as messages of the public services."""

from __future__ import annotations

import json
from contextlib import suppress

from coordinator.control.core.facts import JobFacts
from coordinator.control.core.lifecycle import PAUSED, QUEUED, RUNNING, state_name
from coordinator.control.core.state import Core, JobRuntime, Worker
from coordinator.control.core.tree import runs
from phalanx.v1 import cluster_service_pb2, job_pb2

_SOFT = frozenset((QUEUED, RUNNING))


def job_view(facts: JobFacts, runtime: JobRuntime | None, generation: int = 0) -> job_pb2.Job:
    """Return a job as people see it.

    `runtime` adds what is soft, where there is any; `generation` is that of the leader that tells.
    """
    kept, changed = facts.kept, facts.kept.changed
    job = job_pb2.Job(
        id=facts.job_id,
        spec=facts.spec,
        spec_sha256=facts.plan.spec_sha256,
        state=facts.state,
        reason=changed.reason,
        message=changed.message,
        submitter=kept.submitted.submitter,
        failures=changed.failures,
        generation=generation,
    )
    job.create_time.FromNanoseconds(kept.submit_unix_nanos)
    if kept.start_unix_nanos:
        job.start_time.FromNanoseconds(kept.start_unix_nanos)
    if kept.end_unix_nanos:
        job.end_time.FromNanoseconds(kept.end_unix_nanos)
    if changed.HasField("result"):
        job.result.CopyFrom(changed.result)
    if changed.HasField("progress") or facts.continued is not None:
        job.progress.CopyFrom(_progress_before(facts))
    if runtime is not None and facts.state in _SOFT and runtime.reason:
        job.reason, job.message = runtime.reason, runtime.message
    if runtime is not None and facts.state in (RUNNING, PAUSED) and runtime.report is not None:
        job.progress.CopyFrom(progress_view(facts, runtime))
    return job


def progress_view(facts: JobFacts, runtime: JobRuntime) -> job_pb2.Progress:
    """Return how far a running job is, as its root and its workers last said."""
    report = runtime.report
    if report is None:
        progress = _progress_before(facts)
    else:
        progress = job_pb2.Progress(
            step=report.step,
            total_steps=facts.plan.total_steps,
            epoch=report.epoch,
            examples=report.examples,
            examples_per_second=report.examples_per_second,
            metrics=report.metrics,
            checkpoint_step=report.checkpoint_step,
            best=report.best if report.HasField("best") else None,
        )
    for worker_id in sorted(runtime.hosts):
        progress.workers.add(
            worker_id=worker_id,
            shards=_shard_ranges(runtime, worker_id),
            examples_per_second=runtime.hosts[worker_id].progress.examples_per_second,
        )
    return progress


def _progress_before(facts: JobFacts) -> job_pb2.Progress:
    """Return how far a job is before its root says so: as far as it was, or as another one was."""
    progress = job_pb2.Progress(total_steps=facts.plan.total_steps)
    if facts.kept.changed.HasField("progress"):
        progress.CopyFrom(facts.kept.changed.progress)
    elif facts.continued is not None:
        progress.step = facts.continued.step
        with suppress(ValueError, KeyError, TypeError):
            root_state = json.loads(facts.continued.root_state)
            progress.epoch, progress.examples = root_state["epoch"], root_state["examples"]
    return progress


def worker_view(core: Core, worker: Worker) -> cluster_service_pb2.Worker:
    """Return a worker as operators see it."""
    hello = worker.hello
    view = cluster_service_pb2.Worker(
        id=worker.id,
        incarnation=hello.incarnation,
        state=worker.state,
        reason=worker.reason,
        slots=hello.slots,
        fingerprint=hello.fingerprint,
        labels=hello.labels,
        pid=hello.pid,
        host=hello.host,
        resident_bytes=worker.resident_bytes,
        cpu_fraction=worker.cpu_fraction,
        memory_bytes=hello.memory_bytes,
        libraries=hello.libraries,
        gpus=hello.gpus,
        gpu_kinds=hello.gpu_kinds,
    )
    view.join_time.FromNanoseconds(worker.join_unix_nanos)
    kept_out = [job for job in core.jobs.values() if worker.id in job.told_ineligible]
    for job in core.running():
        if worker.id in job.hosts:
            hosting = job.hosts[worker.id]
            view.jobs.add(
                job_id=job.job_id,
                shards=_shard_ranges(job, worker.id),
                step=hosting.progress.step,
                examples_per_second=hosting.progress.examples_per_second,
            )
    if worker.state == cluster_service_pb2.Worker.STATE_READY and kept_out and not view.jobs:
        view.state = cluster_service_pb2.Worker.STATE_INELIGIBLE
        why = kept_out[0].told_ineligible[worker.id]
        view.reason = f"left out of {kept_out[0].job_id}: {why}"
    return view


def cluster_view(core: Core) -> cluster_service_pb2.GetClusterResponse:
    """Return the members and the number of jobs by state; the runtime adds what only it knows."""
    view = cluster_service_pb2.GetClusterResponse(generation=core.generation)
    newest_first = sorted(core.workers.values(), key=lambda each: -each.join_unix_nanos)
    view.workers.extend(worker_view(core, worker) for worker in newest_first)
    owned: dict[str, list[str]] = {}
    for job in core.running():
        for owner in {each.aggregator_id for each in core.facts_of(job).ranges}:
            owned.setdefault(owner, []).append(job.job_id)
    for aggregator in sorted(core.aggregators.values(), key=lambda each: each.id):
        view.aggregators.add(
            id=aggregator.id,
            incarnation=aggregator.hello.incarnation,
            address=aggregator.hello.address,
            pid=aggregator.hello.pid,
            host=aggregator.hello.host,
            job_ids=sorted(owned.get(aggregator.id, [])),
            connected=aggregator.connected,
        )
    for facts in core.facts.jobs.values():
        view.jobs[state_name(facts.state)] += 1
    return view


def _shard_ranges(runtime: JobRuntime, worker_id: str) -> list[job_pb2.ShardRange]:
    owned = (shard for shard, owner in runtime.train.owners.items() if owner == worker_id)
    return [job_pb2.ShardRange(first=first, count=stop - first) for first, stop in runs(owned)]
