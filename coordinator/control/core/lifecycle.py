"""The life of a job: one literal table. A pair that is missing is an error."""

from __future__ import annotations

from enum import StrEnum

from phalanx.errors import FailedPrecondition
from phalanx.v1.job_pb2 import Job

QUEUED = Job.STATE_QUEUED
RUNNING = Job.STATE_RUNNING
PAUSED = Job.STATE_PAUSED
SUCCEEDED = Job.STATE_SUCCEEDED
FAILED = Job.STATE_FAILED
CANCELLED = Job.STATE_CANCELLED


class Verb(StrEnum):
    """What can happen to a job."""

    START = "start"
    REQUEST_PAUSE = "pause"
    PAUSE = "be paused"
    RESUME = "resume"
    QUEUE_AGAIN = "wait to be resumed"
    SUCCEED = "succeed"
    FAIL = "fail"
    CANCEL = "cancel"
    RETRY = "retry"


NEXT: dict[tuple[Job.State.ValueType, Verb], Job.State.ValueType] = {
    (QUEUED, Verb.START): RUNNING,
    (QUEUED, Verb.FAIL): FAILED,
    # A retried job whose final checkpoint was complete: only its model was missing.
    (QUEUED, Verb.SUCCEED): SUCCEEDED,
    (QUEUED, Verb.CANCEL): CANCELLED,
    # A new term of a running job: an aggregator was lost.
    (RUNNING, Verb.START): RUNNING,
    (RUNNING, Verb.REQUEST_PAUSE): RUNNING,
    (RUNNING, Verb.PAUSE): PAUSED,
    (RUNNING, Verb.SUCCEED): SUCCEEDED,
    (RUNNING, Verb.FAIL): FAILED,
    (RUNNING, Verb.CANCEL): CANCELLED,
    (PAUSED, Verb.RESUME): RUNNING,
    # As many run as may: it takes its turn, as others do.
    (PAUSED, Verb.QUEUE_AGAIN): QUEUED,
    # One that waits to be resumed, and is not to go on after all.
    (QUEUED, Verb.PAUSE): PAUSED,
    (PAUSED, Verb.FAIL): FAILED,
    (PAUSED, Verb.CANCEL): CANCELLED,
    (FAILED, Verb.RETRY): QUEUED,
}

ENDED = frozenset((SUCCEEDED, FAILED, CANCELLED))

EVENT_OF = {SUCCEEDED: "JOB_SUCCEEDED", FAILED: "JOB_FAILED", CANCELLED: "JOB_CANCELLED"}


def state_name(state: Job.State.ValueType) -> str:
    """Return the name of a state without its prefix, as people read it."""
    return Job.State.Name(state).removeprefix("STATE_")


def next_state(job_id: str, state: Job.State.ValueType, verb: Verb) -> Job.State.ValueType:
    """Return the state after `verb`. Raises FailedPrecondition where the table has no such pair."""
    try:
        return NEXT[state, verb]
    except KeyError:
        allowed = sorted(state_name(from_) for from_, each in NEXT if each is verb)
        raise FailedPrecondition(
            f"job {job_id} is {state_name(state)} and cannot {verb}; "
            f"only a job that is {' or '.join(allowed)} can",
            reason="WRONG_STATE",
            details={"state": state_name(state)},
        ) from None
