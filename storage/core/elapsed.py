"""Time that several processes agree on, without anybody's wall clock.

Storage's processes share one row: the time that has elapsed while any of them ran, and a token that
changes whenever somebody writes it. A process that finds the token that it found before adds what
has passed since then on its own monotonic clock; one that finds another token only notes it. So no
stretch of time is added twice, and the row is never ahead of real time, whoever stops, starts or
dies; it falls behind while nobody runs.

Rules
-----
- An age is the time now (``now_s``) minus the stamp of what happened (``stamp_s``). It is never
  more than what has really passed, and less by what nobody adds.
- The time now is the row, and what this process might add to it.
- A stamp is the row, and what others might still add to it from before that moment: what has passed
  since the row was written. A process that did not write it knows only that this came after its own
  look before, when there was another token. At its first look it knows nothing: so it writes a
  token of its own, and what others had not added is lost.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Elapsed:
    """The row."""

    elapsed_s: float
    token: str


@dataclass(frozen=True)
class Look:
    """What a process found, or left there, and when by its own clock.

    The row was written at ``written_after_s`` or later.
    """

    token: str
    at_s: float
    written_after_s: float


def advance(
    row: Elapsed | None, last: Look | None, at_s: float, token: str
) -> tuple[Elapsed, Look]:
    """Return the row as it is to be stored, and the look, which counts once that is durable.

    ``token`` was never used before.
    """
    if row is not None and last is not None and last.token != row.token:
        return row, Look(row.token, at_s, last.at_s)
    elapsed_s = 0.0 if row is None else row.elapsed_s
    if last is not None and row is not None:
        elapsed_s += max(0.0, at_s - last.at_s)
    return Elapsed(elapsed_s, token), Look(token, at_s, at_s)


def now_s(row: Elapsed, last: Look, at_s: float) -> float:
    """Return the time to compare stamps with."""
    return advance(row, last, at_s, row.token)[0].elapsed_s


def stamp_s(row: Elapsed, last: Look, at_s: float) -> float:
    """Return the stamp of what happens now."""
    return row.elapsed_s + max(0.0, at_s - last.written_after_s)
