"""Late shards of an all-reduce job, as the owner of a range has them copied.

Theory of operation. Which shards are late and who computes copies of them is decided as on
aggregators (`phalanx.copies`). But members must not leave one of them behind: whoever is more than
one step back could not be brought up by the gradient that is kept, and what is reduced is kept for
two steps only. That every member takes part in every step is what holds them together; copies would
let a step go on without one.

So copies are ordered once every member has shown in the open round that it holds the version: by a
frame, or by its answer to a question. A leaf that hangs, or is slow, is in a member that answers,
and costs what it costs with a parameter server. A member that does not answer holds the job up. How
long is told to control, which begins a term without it after a lease. One to which the state is
still on its way says that, and is waited for.

The parameters that a job begins with are made by the root, as a round of one shard whose home is
known. Nobody can be left behind then, since nobody holds anything: a copy is ordered as soon as it
is due, and whoever was ordered one is asked whether it has come to hold the version.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from phalanx.copies import Copies, Key, OpenRound, Order, Started
from phalanx.given import GivenWork
from phalanx.reduction import Node
from phalanx.v1 import aggregation_service_pb2 as pb
from phalanx.v1 import coordination_service_pb2 as coordination
from phalanx.v1.training_pb2 import GoRecord, TreeNode

ASK_EVERY_S = 1.0
"""A question that is not answered is asked again."""


@dataclass
class Due:
    """What the owner of a range has to send now."""

    orders: list[Order] = field(default_factory=list)
    #: Members to be asked whether they hold the version of the open round.
    questions: list[str] = field(default_factory=list)
    #: What is new to control.
    started: list[Started] = field(default_factory=list)


class LateShards:
    """The rule for one range in one term. Times are seconds since the term began."""

    def __init__(self, worker_id: str, members: Iterable[str]) -> None:
        self._copies = Copies()
        self._copies.stream_opened(worker_id, takes_copies=True)
        self._others = tuple(member for member in members if member != worker_id)
        self._worker_id = worker_id
        self._key: Key | None = None
        #: In the round of the initial parameters: who was ordered to make them as well.
        self._makers: set[str] | None = None
        #: Members that have shown that they hold the version of the open round.
        self._shown: set[str] = set()
        self._waiting = Due()
        self._asked_s: dict[str, float] = {}
        #: Since when members are asked, or were heard to be on their way.
        self._unheard_s: dict[str, float] = {}

    @property
    def version(self) -> int:
        """The version of the open round, which members are asked for."""
        return self._key[0] if self._key is not None else -1

    def member_opened(self, member: str) -> None:
        """A member opened a stream; what was asked on the one before may have got lost."""
        self._copies.stream_opened(member, takes_copies=True)
        self._asked_s.pop(member, None)

    def member_closed(self, member: str) -> None:
        """A member's stream ended."""
        self._copies.stream_closed(member)

    def turn(self, round: OpenRound | None, now_s: float) -> None:
        """Another round may be open now."""
        self._copies.turn(round, now_s)
        key = round.key if round is not None else None
        if key != self._key:
            self._key, self._waiting, self._makers = key, Due(), None
            for known in (self._shown, self._asked_s, self._unheard_s):
                known.clear()

    def initialises(self, key: Key, now_s: float) -> None:
        """This member makes the initial parameters now, until another round is open."""
        self.turn(OpenRound(key, GoRecord.ACTION_INITIALISE, 1, lambda: 1), now_s)
        self._copies.belong(self._worker_id, 1)
        self._makers = set()

    def frame(self, member: str, key: Key, node: Node, *, copy: bool, now_s: float) -> None:
        """A member sent a frame; to be called before the range takes it."""
        self._copies.frame(member, key, node, copy=copy, now_s=now_s)
        if key == self._key:
            self._shown.add(member)

    def answered(
        self, member: str, version: int, now_s: float, *, held: bool, starting: bool
    ) -> None:
        """A member answered a question."""
        if held and version >= self.version:
            self._shown.add(member)
        elif starting and member in self._unheard_s:
            self._unheard_s[member] = now_s

    def look(self, now_s: float, held: int) -> Due:
        """Decide what is due now; `held` is the version that is held here."""
        if self._key is None:
            return Due()
        orders, started = self._copies.look(now_s, control_away=False)
        self._waiting.orders += orders
        self._waiting.started += started
        if self._makers is not None:
            return self._have_made(self._makers, now_s)
        if not self._waiting.orders:
            return Due()
        behind = [member for member in self._others if member not in self._shown]
        if not behind and held >= self.version:
            due, self._waiting = self._waiting, Due()
            return due
        for member in behind:
            self._unheard_s.setdefault(member, now_s)
        questions = [each for each in behind if self._may_ask(each, now_s)]
        self._asked_s.update(dict.fromkeys(questions, now_s))
        return Due(questions=questions)

    def unheard(self, now_s: float) -> dict[str, float]:
        """Members for whose answer copies wait, and for how long."""
        if not self._waiting.orders:
            return {}
        return {
            member: now_s - since_s
            for member, since_s in self._unheard_s.items()
            if member not in self._shown
        }

    def _have_made(self, makers: set[str], now_s: float) -> Due:
        """The orders for the initial parameters, and questions to whoever got one."""
        due, self._waiting = self._waiting, Due()
        makers.update(order.worker_id for order in due.orders)
        makers.discard(self._worker_id)
        due.questions = [each for each in sorted(makers) if self._may_ask(each, now_s)]
        self._asked_s.update(dict.fromkeys(due.questions, now_s))
        return due

    def _may_ask(self, member: str, now_s: float) -> bool:
        asked_s = self._asked_s.get(member)
        return asked_s is None or now_s - asked_s >= ASK_EVERY_S


def copies_wanted(term: int, order: Order, given: GivenWork) -> pb.CopyNodes:
    """An order as members get it."""
    nodes = [TreeNode(first=node.first, span=node.span) for node in order.nodes]
    return pb.CopyNodes(
        term=term,
        version=order.key[0],
        round=order.key[1],
        nodes=nodes,
        given=given.order(order.worker_id, nodes),
    )


def copies_started(job_id: str, term: int, started: Started) -> coordination.SessionRequest:
    """What control hears of copies."""
    return coordination.SessionRequest(
        copies_started=coordination.CopiesStarted(
            job_id=job_id,
            term=term,
            step=started.key[0],
            worker_id=started.worker_id,
            cause=started.cause,
            shards=started.shards,
            copied_to=started.copied_to,
            waited_s=started.waited_s,
            patience_s=started.patience_s,
            evaluation=started.action == GoRecord.ACTION_EVALUATE,
        )
    )
