"""When a leaf process that died is started again."""

from __future__ import annotations

_FIRST_WAIT_S = 0.1
_LONGEST_WAIT_S = 5.0
_FORGIVEN_AFTER_S = 30.0


class Restarts:
    """Back-off of one slot: at once after the first death, then longer and longer."""

    def __init__(self) -> None:
        self._deaths = 0
        self._last_death_s = float("-inf")

    def wait_after_death(self, now_s: float) -> float:
        """Note a death; return how many seconds to wait before the next start."""
        if now_s - self._last_death_s > _FORGIVEN_AFTER_S:
            self._deaths = 0
        self._last_death_s = now_s
        self._deaths += 1
        if self._deaths == 1:
            return 0.0
        return float(min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2 ** (self._deaths - 2)))
