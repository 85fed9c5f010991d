"""Which versions of the protocol between processes this one speaks, and whether two understand
each other.

A version is raised where a process of the version before would misunderstand what it is told. New
fields and messages that others may ignore need none. Each release speaks its own version and the
one before, so that during an upgrade both are at work side by side.

Every connection says it where HTTP/2 says what a program is: in ``user-agent``. So it holds for all
services alike, and each server looks before a call is served. Who says nothing, as ``grpcurl`` does
or a client in another language, is taken for one that knows the public interface only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from phalanx.errors import FailedPrecondition

NEWEST = 1
"""The version that this code speaks."""
OLDEST = 1
"""The oldest version that it still understands."""

PRODUCT = "phalanx-protocol"
_SAID = re.compile(rf"\b{PRODUCT}/(\d{{1,6}})-(\d{{1,6}})(?!\S)")
_AGENT = "user-agent"


def user_agent() -> str:
    """Return what every connection says of this process."""
    return f"{PRODUCT}/{OLDEST}-{NEWEST}"


def check_caller(metadata: Iterable[tuple[str, str | bytes]]) -> None:
    """Raise FailedPrecondition (PROTOCOL_VERSION) where the caller speaks none of our versions."""
    agent = next((value for key, value in metadata if key == _AGENT), "")
    said = _SAID.search(agent.decode(errors="replace") if isinstance(agent, bytes) else agent)
    if said is not None:
        check_overlap(int(said[1]), int(said[2]))


def check_overlap(oldest: int, newest: int) -> None:
    """Raise FailedPrecondition (PROTOCOL_VERSION) where these versions and ours have none in
    common."""
    if oldest <= NEWEST and newest >= OLDEST:
        return
    is_newer = oldest > NEWEST
    older = "this process" if is_newer else "the caller"
    raise FailedPrecondition(
        f"the caller speaks {_these(oldest, newest)} of the protocol and this process "
        f"{_these(OLDEST, NEWEST)}: {older} is too old. Upgrade {older}, release by release: "
        "storage first, then control, aggregators, workers, and clients last",
        reason="PROTOCOL_VERSION",
        details={
            "caller_oldest": str(oldest),
            "caller_newest": str(newest),
            "oldest": str(OLDEST),
            "newest": str(NEWEST),
        },
    )


def _these(oldest: int, newest: int) -> str:
    return f"version {newest}" if oldest == newest else f"versions {oldest} to {newest}"
