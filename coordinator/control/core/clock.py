"""Time as the core sees it: an argument, never read."""

from __future__ import annotations

from dataclasses import dataclass

NANOS = 1_000_000_000


@dataclass(frozen=True)
class Instant:
    """One moment on two clocks.

    `monotonic_s` decides (silence, deadlines); `unix_nanos` is only written down for people.
    """

    monotonic_s: float
    unix_nanos: int
