"""How old a blob is, whatever the wall clock does.

Garbage collection spares young blobs, since their uploaders have not yet had the time to name them.
A file's time is the wall clock's, which can be set: so the process remembers when it stored or
touched a blob, and believes of others no more than that they are as old as it is itself.
"""

import time

_REMEMBERED_S = 24 * 3600.0
"""Longer than any sensible grace time; what is older is as old as its file says. Where somebody
asked for a longer one, it is remembered for as long."""


class BlobAges:
    """Ages of blobs by this process's monotonic clock. Its callers hold a lock."""

    def __init__(self) -> None:
        self._started_s = time.monotonic()
        # The wall clock as it would be had nobody set it since.
        self._wall_began_s = time.time()
        self._touched_s: dict[str, float] = {}
        self._remembered_s = _REMEMBERED_S

    def asked_for(self, grace_s: float) -> None:
        """Note a grace time: nothing is forgotten before it is as old."""
        self._remembered_s = max(self._remembered_s, grace_s)

    def touched(self, digest: str) -> None:
        """Note that a blob is young now."""
        # At the end, where the youngest are.
        self._touched_s.pop(digest, None)
        self._touched_s[digest] = time.monotonic()
        self._forget()

    def removed(self, digest: str) -> None:
        """Note that a blob is gone."""
        self._touched_s.pop(digest, None)

    def age_s(self, digest: str, modified_s: float) -> float:
        """Return the age of a blob whose file has this time; negative if that is in the future."""
        now_s = time.monotonic()
        touched_s = self._touched_s.get(digest)
        if touched_s is not None:
            return now_s - touched_s
        up_s = now_s - self._started_s
        return min(self._wall_began_s + up_s - modified_s, up_s)

    def _forget(self) -> None:
        limit_s = time.monotonic() - self._remembered_s
        while self._touched_s:
            oldest = next(iter(self._touched_s))
            if self._touched_s[oldest] >= limit_s:
                return
            del self._touched_s[oldest]
