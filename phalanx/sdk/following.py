"""Streams that somebody follows: attached to again when the cluster was away for a while."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from phalanx.errors import DeadlineExceeded, Unavailable
from phalanx.sdk.backend import Backend
from phalanx.sdk.methods import GET_CLUSTER
from phalanx.v1.cluster_service_pb2 import GetClusterRequest

FOLLOW_S = 30.0
"""Life of one stream. A process that was stopped keeps its streams open and says nothing on them,
as one does that has nothing to say; so each of them ends, and somebody is asked who lives."""
REATTACH_S = 60.0
"""How long a follower keeps trying to attach again to a cluster that went away."""
TAKE_OVER_S = 10.0
"""How long a list is asked for again while one control process takes over from another."""

ItemT = TypeVar("ItemT")


def follow(backend: Backend, attach: Callable[[], Iterator[ItemT]]) -> Iterator[ItemT]:
    """Yield what a stream brings, and after a lost connection what the next one does.

    ``attach`` opens a stream of FOLLOW_S that goes on behind the last item. Raises Unavailable
    soon where there is no cluster, and after REATTACH_S where it does not come back.
    """
    backend.call(GET_CLUSTER, GetClusterRequest())
    away_since_s: float | None = None
    while True:
        try:
            for item in attach():
                away_since_s = None
                yield item
            return
        except (Unavailable, DeadlineExceeded) as error:
            if isinstance(error, DeadlineExceeded) and _answers(backend):
                away_since_s = None
                continue
            now_s = time.monotonic()
            away_since_s = away_since_s or now_s
            if now_s - away_since_s >= REATTACH_S:
                raise
        time.sleep(random.uniform(0.2, 0.4))


def whole(backend: Backend, attach: Callable[[], Iterator[ItemT]]) -> Iterator[ItemT]:
    """Yield all that there is, by several streams where one breaks off.

    A process that leads no more ends its streams, and the next leader goes on. Who cannot say that
    this is all is asked again, or another one is: storage may be just being started anew. Raises
    Unavailable where nobody can for TAKE_OVER_S.
    """
    deadline_s = time.monotonic() + TAKE_OVER_S
    while True:
        try:
            yield from attach()
            return
        except Unavailable as error:
            if time.monotonic() >= deadline_s:
                raise
            if error.reason != "INCOMPLETE":
                backend.call(GET_CLUSTER, GetClusterRequest())
            time.sleep(random.uniform(0.2, 0.4))


def _answers(backend: Backend) -> bool:
    try:
        backend.call(GET_CLUSTER, GetClusterRequest())
    except (Unavailable, DeadlineExceeded):
        return False
    return True
