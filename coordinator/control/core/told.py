"""What members say, as long as there is room for: several texts stand in one record of a journal,
and no record may be longer than storage takes, whoever says whatever."""

from __future__ import annotations

from collections.abc import Mapping

from phalanx.errors import InvalidArgument
from phalanx.layouts import check_description
from phalanx.needs import LIBRARIES
from phalanx.texts import shortened
from phalanx.v1.coordination_service_pb2 import (
    CopiesStarted,
    JobDescribed,
    JobReport,
    WorkerHello,
)
from phalanx.v1.job_pb2 import Failure

TEXT_MAX = 16 * 1024
"""Characters; what leaf processes of ours say is shorter."""

DETAILS_MAX = 32
NAME_MAX, VALUE_MAX = 200, 4096
WORKERS_MAX = 1000
SHARDS_MAX = 4096
REPORT_BYTES_MAX = 1024 * 1024
COPY_CAUSES = ("late", "lost")
"""Those of `phalanx.copies`. Each is a series of a metric, so what is none of them is `other`."""
LIBRARIES_MAX, GPU_KINDS_MAX = 32, 16
"""So many are kept of one worker."""


def text(said: str) -> str:
    """Return a message or a traceback."""
    return shortened(said, TEXT_MAX)


def name(said: str) -> str:
    """Return a reason or a code."""
    return shortened(said, NAME_MAX)


def details(said: Mapping[str, object]) -> dict[str, str]:
    """Return the details of an event."""
    first = list(said.items())[:DETAILS_MAX]
    return {name(key): shortened(str(value), VALUE_MAX) for key, value in first}


def hello(said: WorkerHello) -> WorkerHello:
    """Return what a worker says it is, with the libraries that jobs may need first."""
    kept = WorkerHello()
    kept.CopyFrom(said)
    kept.libraries.clear()
    ours = {each.package for each in LIBRARIES}
    for package in sorted(said.libraries, key=lambda each: (each not in ours, each))[
        :LIBRARIES_MAX
    ]:
        kept.libraries[name(package)] = name(said.libraries[package])
    kept.gpu_kinds[:] = sorted({name(each) for each in said.gpu_kinds})[:GPU_KINDS_MAX]
    return kept


def failure(said: Failure) -> Failure:
    """Return a failure with its texts."""
    kept = Failure()
    kept.CopyFrom(said)
    kept.code, kept.message, kept.traceback = (
        name(said.code),
        text(said.message),
        text(said.traceback),
    )
    kept.worker_ids[:] = [name(each) for each in said.worker_ids[:WORKERS_MAX]]
    return kept


def description(said: JobDescribed) -> JobDescribed:
    """Return what was found out about a job; that it is too long, as a failure, where it is."""
    kept = JobDescribed(job_id=said.job_id)
    if said.HasField("failure"):
        kept.failure.CopyFrom(failure(said.failure))
        return kept
    try:
        check_description(said)
    except InvalidArgument as error:
        kept.failure.CopyFrom(Failure(code=error.reason, message=error.message, shard=-1))
        return kept
    return said


def copies(said: CopiesStarted) -> CopiesStarted:
    """Return which shards are copied for whom, with no more and no longer names than ours have."""
    kept = CopiesStarted()
    kept.CopyFrom(said)
    kept.worker_id = name(said.worker_id)
    kept.cause = said.cause if said.cause in COPY_CAUSES else "other"
    kept.copied_to[:] = [name(each) for each in said.copied_to[:WORKERS_MAX]]
    kept.shards[:] = said.shards[:SHARDS_MAX]
    return kept


def report(said: JobReport) -> JobReport:
    """Return a report; of one that is longer than any of ours only what has one length."""
    if said.ByteSize() <= REPORT_BYTES_MAX:
        return said
    kept = JobReport()
    kept.CopyFrom(said)
    kept.reason, kept.message = name(said.reason), text(said.message)
    if said.HasField("failure"):
        kept.failure.CopyFrom(failure(said.failure))
    kept.ClearField("metrics")
    kept.ClearField("best")
    kept.ClearField("late_workers")
    kept.ClearField("outvoted_workers")
    return kept
