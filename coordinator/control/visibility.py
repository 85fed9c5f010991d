"""What of a cluster that several namespaces share a caller is shown."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from coordinator.control.core.facts import Facts
from phalanx.errors import AlreadyExists
from phalanx.keys.caller import current_caller
from phalanx.v1 import cluster_service_pb2 as pb

HIDDEN = "a job of another namespace"


def check_job(facts: Facts, job_id: str) -> None:
    """Raise NotFound where a job is in a namespace that is not open to the caller.

    One that is not there is left to others: of a deleted one the answer may be remembered.
    """
    job = facts.jobs.get(job_id)
    if job is not None:
        current_caller().check_job(job_id, job.spec.namespace)


def is_visible(facts: Facts, job_id: str) -> bool:
    """Whether what belongs to a job, or with an empty id to none, is shown to the caller."""
    caller = current_caller()
    if not job_id or caller.acts_everywhere:
        return True
    job = facts.jobs.get(job_id)
    return job is not None and caller.may_act_in(job.spec.namespace)


@contextlib.contextmanager
def subjects_hidden(facts: Facts) -> Iterator[None]:
    """Have whoever uses the request id of somebody else not hear which job that was about."""
    try:
        yield
    except AlreadyExists as error:
        if is_visible(facts, error.details.get("subject", "")):
            raise
        raise AlreadyExists(
            "this request id was used for another request; use a new id for a new request",
            reason=error.reason,
        ) from None


def hide_jobs(facts: Facts, view: pb.Worker) -> pb.Worker:
    """Take out of a worker's view what tells of other namespaces' jobs; return the view."""
    if not current_caller().acts_everywhere:
        shown = [job for job in view.jobs if is_visible(facts, job.job_id)]
        del view.jobs[:]
        view.jobs.extend(shown)
        for job_id in facts.jobs:
            if job_id in view.reason and not is_visible(facts, job_id):
                view.reason = view.reason.replace(job_id, HIDDEN)
    return view
