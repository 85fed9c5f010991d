"""Who computes the copies of contributions that are compared: asked for, owed, late.

A worker owes the nodes of its *home*, which it delivers of its own accord, and those that it was
asked for; both only in the present round. Of each node as many workers must owe a copy as equal
ones are missing; where they do not, another worker is asked that has not voted on it: one that has
delivered something before (who has just come still loads code and data), the one that owes least,
and among equals one that nobody can tell before. A worker that owes something for longer than twice
the usual time and 100 ms is late: others are asked in its place, in this round and from the start
of the next ones, until it delivers in time all that is its own. Only where nobody else could, those
that are late are asked, too.

Homes are learned from what workers deliver, so moves by control need not be told. Where a node's
home is not known yet, somebody is about to deliver it, so nobody is asked until it has come or is
late. Nor is it known whether what was a worker's home still is, once control has moved shards
within the round: whoever is late with it, or has opened a stream since the round was opened, owes
it only once he is asked for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from coordinator.aggregation.core.ballots import Question
from phalanx.copies import (
    PATIENCE_FACTOR,
    PATIENCE_LEAST_S,
    PATIENCE_UNMEASURED_S,
    Order,
)
from phalanx.reduction import Node

ROUNDS_MEASURED = 64
ROUNDS_MEASURED_LEAST = 3
"""Rounds that a worker must have delivered in time before its times count, besides the first."""

LONG_LATE_S = 2.0
"""After so long a worker that owes something is not counted on: a lease, by default."""

Key = tuple[int, int]
Lot = Callable[[str, int], float]
"""Where a worker stands among those that owe equally much of the node that begins at a shard."""


@dataclass
class _Kind:
    """What is known of rounds of one kind: the home of each node, and times by worker."""

    home: dict[int, str] = field(default_factory=dict)
    times: dict[str, deque[float]] = field(default_factory=dict)


class Verifiers:
    """Decides for one job in one term; times are seconds of one clock."""

    def __init__(self) -> None:
        self._streams: dict[str, int] = {}
        #: Workers that have come since the round was opened.
        self._came: set[str] = set()
        self._discredited: set[str] = set()
        self._kinds: dict[int, _Kind] = {}
        self._kind = _Kind()
        self._key: Key | None = None
        self._opened_s = 0.0
        self._lot: Lot = lambda _name, _first: 0.0
        #: Worker → first shard of each node that it was asked for → when.
        self._asked: dict[str, dict[int, float]] = {}
        #: Worker → when the last copy that it owed came.
        self._last_s: dict[str, float] = {}
        self._delivered: set[tuple[str, int]] = set()
        self._late: dict[str, float] = {}
        #: Workers that have delivered something since their stream was opened.
        self._proven: set[str] = set()

    # -- what happens

    def stream_opened(self, worker_id: str) -> None:
        """A worker opened a stream."""
        if worker_id not in self._streams:
            self._came.add(worker_id)
        self._streams[worker_id] = self._streams.get(worker_id, 0) + 1

    def stream_closed(self, worker_id: str) -> None:
        """A stream of a worker ended; what it was asked for may not come."""
        left = self._streams.pop(worker_id) - 1
        if left > 0:
            self._streams[worker_id] = left
        else:
            self._late.pop(worker_id, None)
            self._proven.discard(worker_id)
        self._asked.pop(worker_id, None)
        self._last_s.pop(worker_id, None)

    def believe(self, worker_id: str, believed: bool) -> None:
        """A worker's copies count, or do not, and then it is asked for none."""
        if believed:
            self._discredited.discard(worker_id)
        else:
            self._discredited.add(worker_id)
            self._late.pop(worker_id, None)

    def turn(self, key: Key, kind: int, lot: Lot, now_s: float) -> None:
        """Another round is open."""
        self._learn()
        self._key, self._opened_s, self._lot = key, now_s, lot
        self._kind = self._kinds.setdefault(kind, _Kind())
        self._asked, self._last_s, self._delivered = {}, {}, set()
        self._came.clear()

    def delivered(self, worker_id: str, node: Node, now_s: float, *, copy: bool) -> None:
        """A worker's copy of a node is whole; with `copy` it was asked for."""
        self._proven.add(worker_id)
        self._delivered.add((worker_id, node.first))
        self._last_s[worker_id] = now_s
        self._asked.get(worker_id, {}).pop(node.first, None)
        if not copy:
            self._kind.home[node.first] = worker_id

    # -- what follows

    def ask(self, questions: Iterable[Question], now_s: float) -> list[Order]:
        """Decide who is to compute more copies of these nodes."""
        if self._key is None:
            return []
        nodes: dict[str, list[Node]] = {}
        loads = {name: self._load(name) for name in self._streams}
        for question in questions:
            for taker in self._takers(question, loads, now_s):
                loads[taker] += 1
                self._asked.setdefault(taker, {})[question.node.first] = now_s
                nodes.setdefault(taker, []).append(question.node)
        return [Order(taker, self._key, tuple(taken)) for taker, taken in sorted(nodes.items())]

    def watch(self, questions: Iterable[Question], now_s: float) -> None:
        """See who is late with what is needed of these nodes."""
        patience_s = self.patience_s
        for question in questions:
            for name in self._owing(question):
                since_s = self._asked.get(name, {}).get(question.node.first, self._opened_s)
                if now_s - since_s >= patience_s:
                    self._late.setdefault(name, since_s)

    def late_workers(self, now_s: float) -> dict[str, float]:
        """Workers that owe something for too long, with the seconds since it was asked."""
        return {name: now_s - since_s for name, since_s in self._late.items()}

    def is_stuck(self, question: Question, now_s: float) -> bool:
        """Nobody is left who could still make up the majority, but for those long late."""
        long_late = {name for name, s in self.late_workers(now_s).items() if s >= LONG_LATE_S}
        able = sum(self._able(name, question) for name in self._streams if name not in long_late)
        return able < question.shortfall

    @property
    def patience_s(self) -> float:
        """For how long a copy may be owed."""
        measured = sorted(
            _p95(times)
            for times in self._kind.times.values()
            if len(times) >= ROUNDS_MEASURED_LEAST
        )
        if not measured:
            return PATIENCE_UNMEASURED_S
        return PATIENCE_FACTOR * measured[len(measured) // 2] + PATIENCE_LEAST_S

    # -- inside

    def _takers(self, question: Question, loads: dict[str, int], now_s: float) -> list[str]:
        first = question.node.first
        owing = self._owing(question)
        unknown = first not in self._kind.home and not question.votes
        if unknown and now_s - self._opened_s < self.patience_s:
            return []
        missing = question.shortfall - sum(name not in self._late for name in owing)
        able = [
            name
            for name in self._streams
            if first not in self._asked.get(name, ()) and self._able(name, question)
            if name in self._late or name not in owing
        ]

        def rank(name: str) -> tuple[bool, bool, int, float]:
            late, unproven = name in self._late, name not in self._proven
            return late, unproven, loads[name], self._lot(name, first)

        able.sort(key=rank)
        return able[: max(0, missing)]

    def _owing(self, question: Question) -> list[str]:
        """Who was asked for the node, or delivers it of its own accord, and has not yet."""
        first = question.node.first
        names = [name for name, asked in self._asked.items() if first in asked]
        home = self._kind.home.get(first)
        if home is not None and home not in names and home not in self._came:
            names.append(home)
        return [name for name in names if self._able(name, question)]

    def _able(self, worker_id: str, question: Question) -> bool:
        """Whether a worker is there and its copy of the node would count."""
        there = worker_id in self._streams and worker_id not in self._discredited
        return there and worker_id not in question.votes

    def _load(self, worker_id: str) -> int:
        """Nodes that a worker owes."""
        own = sum(
            home == worker_id and (worker_id, first) not in self._delivered
            for first, home in self._kind.home.items()
        )
        return own + len(self._asked.get(worker_id, ()))

    def _learn(self) -> None:
        """The round is over: who was in time, and how long it took."""
        kind = self._kind
        homes = set(kind.home.values())
        for name in [name for name in self._late if name not in homes]:
            del self._late[name]  # control moved what was its own
        for name, last_s in self._last_s.items():
            owed = [first for first, home in kind.home.items() if home == name]
            if any((name, first) not in self._delivered for first in owed):
                continue
            self._late.pop(name, None)
            if name in kind.times:
                kind.times[name].append(last_s - self._opened_s)
            else:
                # In its first round a worker loads code and data; that is no measure.
                kind.times[name] = deque(maxlen=ROUNDS_MEASURED)


def _p95(times: deque[float]) -> float:
    """The 95th percentile, rounded down: of a few times it is not the largest."""
    return sorted(times)[(len(times) - 1) * 95 // 100]
