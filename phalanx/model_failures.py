"""Reasons why a model fails, which a job tells in the place of a general one.

They come from processes that run code of users, which may raise whatever it likes. So a reason is
one of these or none, and nothing is decided by it: people are only told what to do.
"""

from __future__ import annotations

from collections.abc import Iterable

from phalanx.errors import PhalanxError

REASONS = frozenset(
    {
        "NO_GPU",
        "DEVICE_LOST",
        "CUBLAS_WORKSPACE",
        "EXTRA_MISSING",
        "NOT_A_MODULE",
        "WRONG_OUTPUTS",
        "NOT_WITH_BUFFERS",
        "START_MODEL_MISFIT",
    }
)
"""Each has a row of its own in docs/ERRORS.md."""


def reason_of(error: BaseException) -> str:
    """Return the reason of an error that a model raised; empty: it is none of these."""
    return error.reason if isinstance(error, PhalanxError) and error.reason in REASONS else ""


def common(said: Iterable[str]) -> str:
    """Return the reason that all attempts gave; empty: they gave several, or one that is none."""
    found = set(said)
    return found.pop() if len(found) == 1 and found <= REASONS else ""
