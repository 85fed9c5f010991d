"""The range of a job whose contributions are compared before they count.

Theory of operation. A `Ballot` stands before each round, of whatever kind: it takes the frames of
all workers, and lets the frames of a contribution through, once, when as many copies of it are
equal as it needs. The round behind it is the one that the job would have without verification, and
gets each contribution exactly once and whole, so the bits are the same, too. With replicas a
contribution needs more than half of them; with an audit it needs two copies where it was drawn, and
one elsewhere. What all others begin with, the initial parameters, is always drawn.

`Verifiers` decides who computes the copies. Only as many are asked for as could be enough; two that
differ call for another one. A worker that was outvoted is told of (`Caught`), and until another
start of it is there nothing of it counts here any more, nor is it asked for anything.

The term ends with this process. What was voted in the open round is then forgotten and computed
again, like the round itself.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from coordinator.aggregation.core.ballots import Ballot, Outvoted, Question, Vote
from coordinator.aggregation.core.effects import Ask, Caught, Effect, Verified
from coordinator.aggregation.core.machine import JobRanges, VerifiersMissing, _Range
from coordinator.aggregation.core.plan import AnyRound
from coordinator.aggregation.core.state import AnyRule
from coordinator.aggregation.core.verifiers import Verifiers
from phalanx.copies import OpenRound
from phalanx.errors import InvalidArgument
from phalanx.privacy.noise import GradientNoise
from phalanx.specs.parts import equal_copies
from phalanx.texts import number_of
from phalanx.training.decisions import RootDecider
from phalanx.v1 import aggregation_service_pb2 as pb
from phalanx.v1 import training_pb2
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import GoRecord

MISSING_AFTER_S = 1.0
"""How long nobody may be there to compute a copy before it is told: members come and go."""

_WORD = (1 << 64) - 1


@dataclass(frozen=True)
class _Peer:
    """One start of a worker."""

    worker_id: str
    incarnation: str


class VerifiedRanges(JobRanges):
    """`JobRanges` of a job whose contributions are verified; see the module's text."""

    def __init__(
        self,
        plan: training_pb2.JobPlan,
        term: int,
        owned: Sequence[training_pb2.ParameterRange],
        optimizer: AnyRule,
        decider: RootDecider | None,
        secret: int,
        noise: GradientNoise | None = None,
    ) -> None:
        if plan.range_count != 1 or decider is None:
            count = number_of(plan.range_count, "range")
            raise InvalidArgument(f"contributions are verified in one range, not in {count}")
        super().__init__(plan, term, owned, optimizer, decider, noise)
        self._range = self._ranges[0]
        self._secret = secret
        train = JobSpec.FromString(plan.spec).train
        self._needed = equal_copies(train)
        audits = train.verification.WhichOneof("kind") == "audit_fraction"
        self._audited = train.verification.audit_fraction if audits else None
        self._verifiers = Verifiers()
        self._peers: dict[object, _Peer] = {}
        self._caught: set[_Peer] = set()
        #: Worker → the start of it that last voted.
        self._voters: dict[str, _Peer] = {}
        self._ballot: Ballot | None = None
        #: The round that the ballot stands before.
        self._guarded: AnyRound | None = None
        self._elapsed_s = 0.0
        self._stuck_s: float | None = None

    @property
    def open_round(self) -> OpenRound | None:
        """None: who is late, and who computes copies, is decided here."""
        return None

    # -- from workers

    def stream_opened(self, stream: object, worker_id: str, incarnation: str = "") -> None:
        """A worker opened a stream. One that was caught is believed again in another start."""
        peer = self._peers[stream] = _Peer(worker_id, incarnation)
        self._verifiers.stream_opened(worker_id)
        self._verifiers.believe(worker_id, peer not in self._caught)

    def stream_closed(self, stream: object) -> None:
        """A stream ended: what has come of a copy is not going on."""
        peer = self._peers.pop(stream, None)
        if peer is not None:
            self._verifiers.stream_closed(peer.worker_id)
            if self._ballot is not None:
                self._ballot.stream_closed(stream)

    def look(self, elapsed_s: float) -> list[Effect]:
        """Ask others where a worker is late or gone."""
        self._elapsed_s = elapsed_s
        if self._ballot is None:
            return []
        self._verifiers.watch(self._ballot.open, elapsed_s)
        return self._ask(self._ballot.open)

    def late_workers(self, elapsed_s: float) -> dict[str, float]:
        """Who has owed a copy for too long, and for how many seconds."""
        return self._verifiers.late_workers(elapsed_s)

    def verifiers_missing(self, elapsed_s: float) -> VerifiersMissing | None:
        """What has waited for a while for copies that nobody is left to compute."""
        ballot = None if self._failed else self._ballot
        stuck = [
            each
            for each in (ballot.open if ballot else ())
            if self._verifiers.is_stuck(each, elapsed_s)
        ]
        if ballot is None or not stuck:
            self._stuck_s = None
            return None
        if self._stuck_s is None:
            self._stuck_s = elapsed_s
        if elapsed_s - self._stuck_s < MISSING_AFTER_S:
            return None
        first = stuck[0]
        return VerifiersMissing(
            version=max(0, ballot.spec.version),
            action=ballot.spec.action,
            leaves=len(stuck),
            node=first.node,
            copies=len(first.votes),
            results=first.results,
            needed=first.needed,
        )

    def contribute(
        self,
        frame: pb.ContributionFrame,
        payload: memoryview,
        elapsed_s: float,
        stream: object = None,
    ) -> list[Effect]:
        """Add one frame of a worker's copy; the last one is a vote. See `JobRanges.contribute`."""
        self._elapsed_s = elapsed_s
        self._check_term(frame.term)
        owned, ballot = self._range, self._ballot
        open_here = frame.range == 0 and (frame.step, frame.round) == owned.key
        if ballot is None or not open_here or self._failed:
            return super().contribute(frame, payload, elapsed_s, stream)
        peer = self._peers.get(stream)
        if peer is None:
            raise InvalidArgument("a contribution that is verified came on no worker's stream")
        if peer in self._caught:
            return []
        vote = ballot.take(peer.worker_id, stream, frame, payload)
        if vote is None:
            return []
        self._voters[peer.worker_id] = peer
        self._verifiers.delivered(vote.worker_id, vote.node, elapsed_s, copy=frame.copy)
        return self._voted(ballot, vote, elapsed_s, stream)

    # -- inside

    def _voted(self, ballot: Ballot, vote: Vote, elapsed_s: float, stream: object) -> list[Effect]:
        question = ballot.question(vote.node)
        effects: list[Effect] = []
        for outvoted in vote.outvoted:
            effects += self._catch(ballot, vote, outvoted)
        if not vote.decided:
            return effects + self._ask([question])
        if question.needed > 1:
            effects.append(Verified())
        for frame, payload in vote.decided:
            effects += super().contribute(frame, payload, elapsed_s, stream)
        return effects

    def _catch(self, ballot: Ballot, vote: Vote, outvoted: Outvoted) -> list[Effect]:
        """Believe this start of a worker no more."""
        peer = self._voters[outvoted.worker_id]
        if peer in self._caught:
            return []
        self._caught.add(peer)
        if peer in self._peers.values():
            self._verifiers.believe(peer.worker_id, False)
        ballot.discredit(peer.worker_id)
        caught = Caught(
            worker_id=peer.worker_id,
            incarnation=peer.incarnation,
            version=ballot.spec.version,
            action=ballot.spec.action,
            node=vote.node,
            digest=outvoted.digest,
            majority=outvoted.majority,
            agreed=outvoted.agreed,
        )
        return [caught, *self._ask(ballot.open)]

    def _ask(self, questions: Iterable[Question]) -> list[Effect]:
        return [Ask(order) for order in self._verifiers.ask(questions, self._elapsed_s)]

    def _accept(self, owned: _Range, go: GoRecord) -> list[Effect]:
        effects = super()._accept(owned, go)
        current = owned.round
        if current is self._guarded:
            return effects
        self._guarded, self._ballot = current, None
        if current is None:
            return effects
        spec = current.spec
        self._ballot = Ballot(spec, self._copies_needed(owned.key, spec.action, spec.width))
        lot = self._lot(owned.key, spec.action)
        self._verifiers.turn(owned.key, spec.action, lot, self._elapsed_s)
        return effects + self._ask(self._ballot.open)

    def _end(self, owned: _Range, go: GoRecord) -> list[Effect]:
        self._ballot = self._guarded = None
        return super()._end(owned, go)

    def _copies_needed(self, key: tuple[int, int], action: int, width: int) -> Callable[[int], int]:
        """How many copies of the node that begins at a shard must be equal in a round."""
        if self._audited is None or action == GoRecord.ACTION_INITIALISE:
            return lambda _first: self._needed
        words = np.array([self._secret & _WORD, self._secret >> 64 & _WORD], np.uint64)
        counter = np.array([0, action, key[1], max(0, key[0])], np.uint64)
        draws = np.random.Generator(np.random.Philox(key=words, counter=counter)).random(width)
        drawn = draws < self._audited
        return lambda first: self._needed if drawn[first] else 1

    def _lot(self, key: tuple[int, int], action: int) -> Callable[[str, int], float]:
        """Who comes first among equals: nobody can tell before whose work he will be asked for."""
        secret = self._secret.to_bytes(16, "little")

        def draw(name: str, first: int) -> float:
            text = struct.pack("<qqqq", *key, action, first) + name.encode()
            drawn = hashlib.blake2b(text, digest_size=8, key=secret).digest()
            return int.from_bytes(drawn, "little") / 2.0**64

        return draw
