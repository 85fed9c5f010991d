"""What may be deleted: a data set or a model goes with the leave of the jobs that refer to it."""

from collections.abc import Iterable

from phalanx.errors import FailedPrecondition

DATASET, MODEL = "data set", "model"
"""What they are called in errors."""
_JOBS_SHOWN = 3


def check_unused(kind: str, name: str, users: Iterable[tuple[str, bool]], *, force: bool) -> None:
    """Raise FailedPrecondition for deleting something that ``users`` refer to.

    These are jobs, and whether they have ended for good. Those that have are only proved and gone
    on from, which a user can forgo with ``force``; the others need it to run.
    """
    ended_of = dict(sorted(users))
    needing = [user for user, ended in ended_of.items() if not ended]
    if needing:
        raise _refused(
            "IN_USE",
            needing,
            f"{kind} {name} is in use by {_listed(needing)}; delete or finish that first",
        )
    if ended_of and not force:
        lost = "verified or gone on from" if kind == DATASET else "verified"
        raise _refused(
            "REFERENCED",
            list(ended_of),
            f"{kind} {name} was used by {_listed(list(ended_of))}: what has ended can be {lost} "
            "only with it; delete that first, or delete this by force (--force)",
        )


def _listed(users: list[str]) -> str:
    more = len(users) - _JOBS_SHOWN
    return ", ".join(users[:_JOBS_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _refused(reason: str, users: list[str], message: str) -> FailedPrecondition:
    details = {"holders": ",".join(users[:_JOBS_SHOWN])}
    return FailedPrecondition(message, reason=reason, details=details)
