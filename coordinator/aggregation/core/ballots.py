"""Which copy of a contribution counts: the votes of workers on the nodes of one round.

Theory of operation. A worker's frames of one node are collected into a *copy*. A whole copy is a
vote for its hash, which is made here of everything that arrived: examples, loss, shards present and
payload. A worker has one vote on a node, whatever it sends again, and the worker is its id; so a
hash counts as many different workers. A node is *decided* once one hash has as many votes as it
needs; its frames then go on, once, to whatever reduces them, and whoever voted otherwise was
outvoted, before or after. Until then nothing of it is in any sum.

Of copies with equal hashes only the first is kept. Nodes that need one vote are decided by the
first copy that comes, and compared with none.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from phalanx.errors import InvalidArgument
from phalanx.reduction import Node
from phalanx.rounds import (
    RoundSpec,
    check_node,
    mask_of,
    payload_values,
)
from phalanx.v1 import aggregation_service_pb2 as pb

Frame = tuple[pb.ContributionFrame, memoryview]


@dataclass(frozen=True)
class Outvoted:
    """A worker's copy of a node differs from that of a majority."""

    worker_id: str
    digest: str
    majority: str
    agreed: tuple[str, ...]


@dataclass(frozen=True)
class Vote:
    """A worker's copy of a node is whole."""

    worker_id: str
    node: Node
    #: Frames to go on with, where this vote decided the node.
    decided: tuple[Frame, ...] = ()
    outvoted: tuple[Outvoted, ...] = ()


@dataclass
class Question:
    """One node of the round: who said what."""

    node: Node
    needed: int
    #: Worker → hash of its copy.
    votes: dict[str, str] = field(default_factory=dict)
    majority: str = ""
    kept: dict[str, tuple[Frame, ...]] = field(default_factory=dict)
    #: Stream → frames that came on it; two of one worker are never mixed.
    arriving: dict[object, _Copy] = field(default_factory=dict)

    @property
    def decided(self) -> bool:
        """Enough copies are equal."""
        return bool(self.majority)

    @property
    def shortfall(self) -> int:
        """Equal copies that are missing at least."""
        return 0 if self.decided else self.needed - max(self._counts().values(), default=0)

    @property
    def results(self) -> int:
        """Different hashes that came."""
        return len(set(self.votes.values()))

    def for_hash(self, digest: str) -> tuple[str, ...]:
        """Who voted for it."""
        return tuple(sorted(name for name, voted in self.votes.items() if voted == digest))

    def _counts(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for digest in self.votes.values():
            counts[digest] = counts.get(digest, 0) + 1
        return counts


class _Copy:
    """Frames of one worker of one node, hashed in the order of the vector."""

    def __init__(self, frame: pb.ContributionFrame, mask: int, frames: int) -> None:
        self.scalars = _scalars(frame, mask)
        self._frames: list[Frame | None] = [None] * frames
        self._hash = hashlib.sha256(self.scalars)
        self._hashed = 0

    def add(self, index: int, frame: pb.ContributionFrame, payload: memoryview) -> bool:
        """Take a frame; return whether the copy is whole now."""
        if self._frames[index] is None:
            self._frames[index] = frame, payload
        while self._hashed < len(self._frames):
            following = self._frames[self._hashed]
            if following is None:
                return False
            self._hash.update(following[1])
            self._hashed += 1
        return True

    @property
    def digest(self) -> str:
        """Hash of a whole copy."""
        return self._hash.hexdigest()

    @property
    def frames(self) -> tuple[Frame, ...]:
        """All frames, in order."""
        return tuple(frame for frame in self._frames if frame is not None)


class Ballot:
    """The votes of one round over the nodes of `unit` shards."""

    def __init__(self, spec: RoundSpec, needed: Callable[[int], int]) -> None:
        """`needed` tells how many copies of the node that begins at a shard must be equal."""
        self.spec = replace(spec, unit=max(1, spec.unit))
        self._index = {first: index for index, (first, _) in enumerate(spec.grid)}
        unit = self.spec.unit
        self._questions = {
            first: Question(Node(first, unit), needed(first))
            for first in range(0, spec.width, unit)
        }

    @property
    def open(self) -> Iterator[Question]:
        """Nodes that are not decided, in order."""
        return (each for each in self._questions.values() if not each.decided)

    def question(self, node: Node) -> Question:
        """Who said what of a node of the round."""
        return self._questions[node.first]

    def take(
        self, worker_id: str, stream: object, frame: pb.ContributionFrame, payload: memoryview
    ) -> Vote | None:
        """Take a worker's frame; return its vote once the copy is whole.

        Raises `InvalidArgument` for what does not fit the round, or the frames before it.
        """
        node = check_node(frame.node, self.spec.width)
        mask = mask_of(frame, node, self.spec.width)
        index, _ = payload_values(self.spec, self._index, frame, payload, mask)
        question = self._questions[node.first]
        if worker_id in question.votes or (question.decided and question.needed == 1):
            return None
        copy = question.arriving.get(stream)
        if copy is None:
            copy = question.arriving[stream] = _Copy(frame, mask, len(self.spec.grid))
        elif copy.scalars != _scalars(frame, mask):
            raise InvalidArgument(
                f"the frames of shard {node.first} in one contribution differ in their examples, "
                "loss or shards present"
            )
        if not copy.add(index, frame, payload):
            return None
        del question.arriving[stream]
        return self._vote(question, worker_id, copy)

    def stream_closed(self, stream: object) -> None:
        """What has come of copies on a stream is not going on."""
        for question in self._questions.values():
            question.arriving.pop(stream, None)

    def discredit(self, worker_id: str) -> None:
        """A worker's word does not count any more, where nothing was decided by it."""
        for question in self.open:
            digest = question.votes.pop(worker_id, "")
            if digest and not question.for_hash(digest):
                del question.kept[digest]

    def _vote(self, question: Question, worker_id: str, copy: _Copy) -> Vote:
        digest = copy.digest
        known = question.majority
        question.votes[worker_id] = digest
        if known:
            late = Outvoted(worker_id, digest, known, question.for_hash(known))
            return Vote(worker_id, question.node, outvoted=() if digest == known else (late,))
        question.kept.setdefault(digest, copy.frames)
        agreed = question.for_hash(digest)
        if len(agreed) < question.needed:
            return Vote(worker_id, question.node)
        question.majority = digest
        frames = question.kept[digest]
        question.kept.clear()
        outvoted = tuple(
            Outvoted(name, voted, digest, agreed)
            for name, voted in sorted(question.votes.items())
            if voted != digest
        )
        return Vote(worker_id, question.node, frames, outvoted)


def _scalars(frame: pb.ContributionFrame, mask: int) -> bytes:
    shards = mask.to_bytes(-(-mask.bit_length() // 8), "little")
    return struct.pack("<qd", frame.example_count, frame.loss_sum) + shards
