"""When a member process that died is started again. Pure: time is an argument."""

from dataclasses import dataclass

FIRST_DELAY_S = 0.2
LONGEST_DELAY_S = 5.0
STEADY_S = 10.0
"""A process that lived this long is healthy again: its next death counts as the first."""


@dataclass(frozen=True)
class RestartPolicy:
    """State of one member's restarts; ``after_death`` returns the next one and when to start again.

    The first restart is immediate, because most deaths are single events and everyone waits for
    this process. A process that dies again soon is started after 0.2, 0.4, … up to 5 seconds.
    """

    deaths: int = 0

    def after_death(self, started_at_s: float, now_s: float) -> tuple["RestartPolicy", float]:
        """Return the policy to keep and the time of the next start."""
        deaths = 1 if now_s - started_at_s >= STEADY_S else self.deaths + 1
        delay_s = 0.0 if deaths == 1 else min(FIRST_DELAY_S * 2 ** (deaths - 2), LONGEST_DELAY_S)
        return RestartPolicy(deaths), now_s + delay_s
