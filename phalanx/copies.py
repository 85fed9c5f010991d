"""Late shards: who should have delivered what is missing, and who computes a copy of it.

Theory of operation. A copy of a leaf is equal to the last bit, so it may be computed anywhere at
any time; the only question is when it pays. The owner of a range (an aggregator, or with all-reduce
a worker) sees what nobody else sees: which shards of its open round are missing, since when, and
who is through with his own. So it asks workers for copies itself, on the streams that they have
open anyway, and control need not be there.

- A worker's *home* is what it delivered of its own accord in the rounds before (copies say that
  they are copies), so moves by control are learned and need not be told.
- A shard that is missing after 2 × p95 + 100 ms is late. The p95 is that of the time from the
  opening of a round until a worker has delivered all of its home, taken at each worker by itself;
  the median over workers counts, weighted by shards, so that a slow one cannot raise it. Copies
  and what was late do not enter it. Before anything is measured, late is what is missing after
  10 s: a worker whose first payload never comes must not hold a job up for good.
- Late shards go to workers that have delivered everything; the home of a late shard is not asked
  to do anything else, so its nodes stay whole. Only where nobody else could, its home is asked
  for a copy, too: it may not be its home any more. After it other late workers are asked.
- A late worker that delivers a part of its home by itself, and the rest only as copies that it was
  asked for, is not late: that rest is not its own any more, and its new home is not known.
- Where everybody owes something, all may be slow, or what is taken for their own may be with a
  worker that is not heard of. So each is asked for what is its own; whoever computes that anyway
  does nothing more for it, and nobody is late.
- A worker that was late is taken to be late again: others compute its home from the start of the
  next rounds on, until it delivers all of it in a round by itself. So a stopped worker costs one
  wait, not one in each step.
- Each range looks for itself. Where another one was first, what comes here are copies that nobody
  here asked for; their home is late then, here as there.
- Shards that nobody has delivered yet are probably those of a worker that never delivered
  anything, so he is not asked for them. They count as late until somebody delivers them.
- The home of a worker whose stream broke is handed out by control, within milliseconds. Only
  while control is away is it handed out here, at once and in each round; and, since a control that
  has just taken over moves what nobody claims after a lease only, until somebody delivers it of
  his own accord.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import reduce
from operator import and_, or_

from phalanx.reduction import Node, children_present, nodes_of_mask, shards_mask, shards_of_mask

PATIENCE_FACTOR = 2.0
PATIENCE_LEAST_S = 0.1
PATIENCE_UNMEASURED_S = 10.0
"""Before anything is measured: about as long as it takes to load code and data."""

ROUNDS_MEASURED = 64
ROUNDS_MEASURED_LEAST = 3
"""Rounds that a worker must have delivered before its times count, besides the first."""

COPIES_MAX = 2
"""Copies of a shard at a time besides the one at home: a leaf that hangs must not hang all."""

LATE, LOST = "late", "lost"
UNKNOWN = ""
"""The home of a shard that nobody has delivered yet."""

Key = tuple[int, int]


@dataclass(frozen=True)
class OpenRound:
    """The oldest open round of the owned ranges; `missing` tells its missing shards as bits."""

    key: Key
    action: int
    width: int
    missing: Callable[[], int]


@dataclass(frozen=True)
class Order:
    """Ask a worker for copies of these nodes in a round."""

    worker_id: str
    key: Key
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class Started:
    """Something new to tell: the home of a worker is copied from now on."""

    worker_id: str
    cause: str
    key: Key
    action: int
    shards: tuple[int, ...]
    copied_to: tuple[str, ...]
    waited_s: float
    patience_s: float


@dataclass
class _Given:
    """What a worker was asked for in the present round."""

    worker_id: str
    mask: int
    given_s: float
    own: bool = False
    """It is probably computing that anyway, so it is no copy."""


@dataclass
class _Kind:
    """What is known of rounds of one kind (training, evaluation): by worker."""

    home: dict[str, int] = field(default_factory=dict)
    frames: dict[str, int] = field(default_factory=dict)
    times: dict[str, deque[float]] = field(default_factory=dict)
    #: Shards that nobody delivered were late, and still nobody delivered them of his own accord.
    unknown_late: bool = False


@dataclass
class _Delivered:
    """What a worker delivered of its own accord in the present round."""

    mask: int = 0
    frames: int = 0
    last_s: float = 0.0


class Copies:
    """Decides for one job in one term. Times are monotonic seconds of one clock."""

    def __init__(self) -> None:
        self._streams: dict[str, int] = {}
        self._takers: set[str] = set()
        self._kinds: dict[int, _Kind] = {}
        self._round: OpenRound | None = None
        self._kind = _Kind()
        self._opened_s = 0.0
        self._patience_s: float | None = None
        self._delivered: dict[str, _Delivered] = {}
        self._given: list[_Given] = []
        self._late: dict[str, float] = {}
        #: Shards of which copies came in the present round, by who computed them.
        self._copied: dict[str, int] = {}
        # Homes whose streams broke while control was away, and which it has not moved since.
        self._orphaned: set[str] = set()
        # Workers that lost a stream in the present round: it says nothing about their homes.
        self._broken: set[str] = set()
        self._told: set[str] = set()

    # -- what happens

    def stream_opened(self, worker_id: str, *, takes_copies: bool) -> None:
        """A worker opened a stream; some do not compute copies."""
        self._streams[worker_id] = self._streams.get(worker_id, 0) + 1
        self._told.discard(worker_id)
        if takes_copies:
            self._takers.add(worker_id)

    def stream_closed(self, worker_id: str) -> None:
        """A stream of a worker ended; what it was asked for is not coming."""
        left = self._streams.pop(worker_id) - 1
        if left > 0:
            self._streams[worker_id] = left
            return
        self._takers.discard(worker_id)
        self._late.pop(worker_id, None)
        self._broken.add(worker_id)
        self._told.discard(worker_id)
        self._given = [given for given in self._given if given.worker_id != worker_id]

    def frame(self, worker_id: str, key: Key, node: Node, *, copy: bool, now_s: float) -> None:
        """A frame arrived; to be called before the ranges take it."""
        if self._round is None or key != self._round.key:
            return
        mask = (1 << node.first + node.span) - (1 << node.first)
        if copy:
            self._copied[worker_id] = self._copied.get(worker_id, 0) | mask
            return
        delivered = self._delivered.get(worker_id)
        if delivered is None:
            delivered = self._delivered[worker_id] = _Delivered()
        delivered.mask |= mask
        delivered.frames += 1
        delivered.last_s = now_s

    def turn(self, round: OpenRound | None, now_s: float) -> bool:
        """Another round may be open now; return whether `look` should be asked at once."""
        known = self._round
        if (round.key if round is not None else None) == (known.key if known is not None else None):
            return False
        if known is not None:
            self._learn(known)
        self._round, self._opened_s, self._patience_s = round, now_s, None
        self._delivered, self._given, self._copied = {}, [], {}
        self._broken = set()
        if round is None:
            return False
        self._kind = self._kinds.setdefault(round.action, _Kind())
        hurt = self._late or self._orphaned or self._kind.unknown_late
        return bool(hurt) or any(home not in self._streams for home in self._kind.home)

    def belong(self, worker_id: str, shards: int) -> None:
        """Whose these shards of the open round are, where that is known before they come."""
        self._kind.home[worker_id] = shards

    # -- what follows

    def late_workers(self, now_s: float) -> dict[str, float]:
        """Workers whose home others compute, with the seconds since they became late."""
        return {worker_id: now_s - since_s for worker_id, since_s in self._late.items()}

    def patience_s(self) -> float | None:
        """How long a round may be open before what is missing is late; None: not measured yet."""
        if self._patience_s is None:
            kind = self._kind
            measured = sorted(
                (_p95(times), kind.home.get(worker_id, 0).bit_count())
                for worker_id, times in kind.times.items()
                if len(times) >= ROUNDS_MEASURED_LEAST
            )
            half = sum(weight for _, weight in measured) / 2
            for seconds, weight in measured:
                half -= weight
                if half <= 0:
                    self._patience_s = PATIENCE_FACTOR * seconds + PATIENCE_LEAST_S
                    break
        return self._patience_s

    def look(self, now_s: float, *, control_away: bool) -> tuple[list[Order], list[Started]]:
        """Decide which copies are due now; cheap while nothing is late."""
        round = self._round
        waited_s = now_s - self._opened_s
        if control_away:
            self._orphaned.update(home for home in self._kind.home if home not in self._streams)
        hurt = self._late or self._orphaned or self._kind.unknown_late
        if round is None or (waited_s < PATIENCE_LEAST_S and not hurt):
            return [], []
        orders: list[Order] = []
        started: list[Started] = []
        missing = round.missing()
        for home, cause, mask in list(self._due(missing, now_s)):
            given = self._give(round, missing, home, cause, mask, now_s)
            if not given:
                continue
            orders += given
            if all(order.worker_id == home for order in given):
                continue
            if cause == LATE and home in self._streams:
                self._late.setdefault(home, self._opened_s)
            elif home == UNKNOWN:
                self._kind.unknown_late = True
            if home not in self._told:
                self._told.add(home)
                started.append(self._tell(round, home, cause, given, waited_s))
        return orders, started

    # -- inside

    def _learn(self, round: OpenRound) -> None:
        """The round is over: take in who delivered what, and in which time."""
        kind = self._kind
        within = (1 << round.width) - 1
        copied = reduce(or_, self._copied.values(), 0)
        for home, shards in kind.home.items():
            missed = home not in self._delivered and home not in self._broken
            if missed and home in self._streams and shards & copied:
                self._late.setdefault(home, self._opened_s)
        for worker_id, delivered in self._delivered.items():
            if worker_id in self._broken:
                continue
            if worker_id in self._late:
                if self._copied_rest_itself(kind, worker_id, delivered.mask):
                    kind.unknown_late = True
                elif delivered.frames < kind.frames.get(worker_id, 0):
                    continue
                del self._late[worker_id]
                self._told.discard(worker_id)
            elif worker_id in self._orphaned:
                self._orphaned.discard(worker_id)
                self._told.discard(worker_id)
            mask = delivered.mask & within
            for other in [other for other in kind.home if other not in self._delivered]:
                self._shrink(kind, other, kind.home[other] & ~mask)
            kind.home[worker_id] = mask
            kind.frames[worker_id] = delivered.frames
            if worker_id in kind.times:
                kind.times[worker_id].append(delivered.last_s - self._opened_s)
            else:
                # In its first round a worker loads code and data; that is no measure.
                kind.times[worker_id] = deque(maxlen=ROUNDS_MEASURED)
        if not reduce(and_, (~home for home in kind.home.values()), within):
            kind.unknown_late = False
        if not kind.unknown_late:
            self._told.discard(UNKNOWN)

    def _copied_rest_itself(self, kind: _Kind, worker_id: str, mask: int) -> bool:
        """Whether a worker delivered all of what was taken for its home, a part of it only as
        copies that it was asked for: control has moved that part to one that is not heard of."""
        others = (each for name, each in self._copied.items() if name != worker_id)
        alone = not mask & reduce(or_, others, 0)
        rest = kind.home.get(worker_id, 0) & ~mask
        return alone and rest != 0 and not rest & ~self._copied.get(worker_id, 0)

    def _shrink(self, kind: _Kind, worker_id: str, home: int) -> None:
        """Others deliver a part of a worker's home as their own: control moved it."""
        if home:
            kind.home[worker_id] = home
            return
        for known in (kind.home, kind.frames, kind.times):
            known.pop(worker_id, None)
        # Also where it has a home in rounds of another kind, which may come late or never.
        self._late.pop(worker_id, None)
        self._orphaned.discard(worker_id)
        self._told.discard(worker_id)

    def _due(self, missing: int, now_s: float) -> Iterator[tuple[str, str, int]]:
        """(home, cause, shards) of what is missing and due, and not asked for often enough."""
        patience_s = self.patience_s()
        if patience_s is None:
            patience_s = PATIENCE_UNMEASURED_S
        overdue = now_s - self._opened_s >= patience_s
        asked, times = 0, [0] * COPIES_MAX  # shards given once or more, twice or more, …
        for given in self._given:
            if given.own:
                continue
            if now_s - given.given_s < patience_s:
                asked |= given.mask
            more = given.mask
            for number, known in enumerate(times):
                times[number], more = known | more, known & more
        free = missing & ~(asked | times[-1])
        known = 0
        for home, shards in self._kind.home.items():
            known |= shards
            if not shards & free:
                continue
            if home in self._orphaned:
                yield home, LOST, shards & free
            elif overdue or home in self._late:
                yield home, LATE, shards & free
        if (overdue or self._kind.unknown_late) and free & ~known:
            yield UNKNOWN, LATE, free & ~known

    def _give(
        self, round: OpenRound, missing: int, home: str, cause: str, mask: int, now_s: float
    ) -> list[Order]:
        """Ask workers for copies: those that are through with their own, where time decides."""
        load = self._load(missing, mask, self._takers - self._late.keys())
        if not load and home in self._takers and not self._given_to(home) & mask:
            # Nobody else could. What is his he owes anyway, but control may have moved it to a
            # worker that is not heard of.
            load = {home: 0}
        # So may it have been with those that are late: what they do not deliver is not theirs.
        load = load or self._load(missing, mask, self._takers & self._late.keys())
        if home == UNKNOWN:
            proven = self._kind.home.keys() | self._delivered.keys()
            load = {name: count for name, count in load.items() if name in proven} or load
        known_late = home in self._late or (home == UNKNOWN and self._kind.unknown_late)
        own = False
        if cause == LATE and not known_late:
            load = {worker_id: count for worker_id, count in load.items() if count == 0}
            if not load and home in self._takers and not self._given_to(home) & mask:
                load, own = {home: 0}, True
        if not load:
            return []
        nodes: dict[str, list[Node]] = {}
        for node in _pieces(mask, round.width, len(load)):
            taker = min(load, key=lambda worker_id: (load[worker_id], worker_id))
            nodes.setdefault(taker, []).append(node)
            load[taker] += shards_mask([node], round.width).bit_count()
        for taker, taken in nodes.items():
            self._given.append(_Given(taker, shards_mask(taken, round.width), now_s, own))
        return [Order(taker, round.key, tuple(taken)) for taker, taken in nodes.items()]

    def _load(self, missing: int, mask: int, takers: Iterable[str]) -> dict[str, int]:
        """Missing shards that each worker owes who may be asked for copies of `mask`."""
        load = {}
        for worker_id in takers:
            home = self._kind.home.get(worker_id, 0)
            given = self._given_to(worker_id)
            if not (home | given) & mask:
                load[worker_id] = ((home | given) & missing).bit_count()
        return load

    def _given_to(self, worker_id: str) -> int:
        """Shards that a worker was asked for in this round."""
        masks = (each.mask for each in self._given if each.worker_id == worker_id)
        return reduce(or_, masks, 0)

    def _tell(
        self, round: OpenRound, home: str, cause: str, given: list[Order], waited_s: float
    ) -> Started:
        mask = shards_mask((node for order in given for node in order.nodes), round.width)
        return Started(
            worker_id=home,
            cause=cause,
            key=round.key,
            action=round.action,
            shards=shards_of_mask(mask),
            copied_to=tuple(sorted(order.worker_id for order in given)),
            waited_s=waited_s,
            patience_s=self.patience_s() or PATIENCE_UNMEASURED_S,
        )


def _p95(times: deque[float]) -> float:
    """The 95th percentile, rounded down: of a few times it is not the largest."""
    return sorted(times)[(len(times) - 1) * 95 // 100]


def _pieces(mask: int, width: int, takers: int) -> list[Node]:
    """Nodes that make up the shards, the largest first, split so that every taker gets some."""
    nodes = nodes_of_mask(mask, width)

    def size(node: Node) -> int:
        return shards_mask([node], width).bit_count()

    while len(nodes) < takers:
        largest = max(nodes, key=size)
        if largest.is_leaf:
            break
        nodes.remove(largest)
        nodes += children_present(largest, width)
    return sorted(nodes, key=lambda node: (-size(node), node.first))
