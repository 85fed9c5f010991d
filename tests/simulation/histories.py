"""What jobs with backup shards computed: any history in which every shard counts once at most.

Which shards a step leaves out is decided by who was slow, so no plain loop knows the bits. But each
version must be the step from the one before it with some set of whole contributions, each added
once, of which no more are missing than the job allows. The set is found by trying; what is told of
the step must be about it. A term that begins from a checkpoint goes on from a version that was
followed before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from numpy.typing import NDArray

from phalanx.errors import DataLoss
from phalanx.training.left_out import LeftOutLog
from tests.simulation import best, jobs, references

Array = NDArray[Any]


@dataclass(frozen=True)
class _Known:
    """A version that was followed: with the state after it, and the shards that its step lacks."""

    parameters: Array
    state: dict[str, Array]
    left_out: frozenset[int] = frozenset()
    examples_left_out: int = 0
    """Of all steps up to this version."""
    before: _Known | None = None

    @property
    def bits(self) -> bytes:
        """What makes two of a version the same."""
        vectors = [self.parameters, *(self.state[name] for name in sorted(self.state))]
        return b"".join(vector.tobytes() for vector in vectors)


class History:
    """One job: all versions of all terms that were followed, and the line of each term."""

    def __init__(self, shape: jobs.Shape) -> None:
        self._shape = shape
        self._steps = references.Steps(shape)
        self._known: dict[tuple[int, bytes], _Known] = {}
        self._lines: dict[int, tuple[int, _Known]] = {}

    def follow(self, term: int, version: int, parameters: Array, state: dict[str, Array]) -> str:
        """A term has this version, with the optimizer's state; returns what is wrong with it.

        The state counts, too: the first step of Adam is the same whatever it is made of.
        """
        bits = _Known(parameters, state).bits
        line = self._lines.get(term)
        known = self._first(version, bits) if line is None else self._next(line, version, bits)
        if known is None:
            return "is no step of its own from a version that was followed"
        self._known[version, bits] = known
        self._lines[term] = version, known
        return ""

    def checkpointed(self, version: int, parameters: Array, vectors: Mapping[str, Array]) -> str:
        """A checkpoint holds this of a version; returns what is wrong with it."""
        state = {name: vectors[name] for name in self._steps.first_state()}
        known = self._known.get((version, _Known(parameters, state).bits))
        if known is None:
            return "is no version that was followed"
        model = _back(known, version - best.model_step(self._shape, version))
        wrong = best.wrong_with(self._shape, version, vectors, model.parameters)
        return wrong or self._wrong_log(known, version, vectors)

    def left_out(self, term: int) -> frozenset[int]:
        """Shards that the newest step of a term left out."""
        return self._lines[term][1].left_out

    def examples(self, version: int, left_out: frozenset[int]) -> int:
        """How many of the examples of these shards belong to the step that makes a version."""
        shape = self._shape
        steps = jobs.steps_of(shape, version - 1)
        return sum(jobs.examples(shape, shard, step) for shard in left_out for step in steps)

    def end(self) -> tuple[str, int]:
        """SHA-256 of the model: of the newest version of the last term, or of the best before it;
        and examples left out on the way to the newest."""
        version, known = self._lines[max(self._lines)]
        model = _back(known, version - best.model_step(self._shape, version))
        return hashlib.sha256(model.parameters.tobytes()).hexdigest(), known.examples_left_out

    def _first(self, version: int, bits: bytes) -> _Known | None:
        if version > 0:
            return self._known.get((version, bits))
        known = _Known(jobs.initial(self._shape).copy(), self._steps.first_state())
        return known if known.bits == bits else None

    def _next(self, line: tuple[int, _Known], version: int, bits: bytes) -> _Known | None:
        last, before = line
        if version != last + 1:
            return None
        nodes = self._steps.received(last, before.parameters)
        for left_out in self._may_be_left_out():
            state = {name: array.copy() for name, array in before.state.items()}
            kept = {shard: node for shard, node in nodes.items() if shard not in left_out}
            made = self._steps.applied(last, before.parameters, state, kept)
            fewer = before.examples_left_out + self.examples(version, left_out)
            known = _Known(made, state, left_out, fewer, before)
            if known.bits == bits:
                return known
        return None

    def _wrong_log(self, known: _Known, version: int, vectors: Mapping[str, Array]) -> str:
        """What is wrong with the log of what the steps up to a version have left out."""
        try:
            log = LeftOutLog.restored(vectors, version)
        except DataLoss as error:
            return f"has no log of its steps: {error}"
        for step in reversed(range(version)):
            told = {shard for shard in log.of(step) if self.examples(step + 1, frozenset({shard}))}
            if {each for each in told if not jobs.is_skipped(self._shape, each, step)} != {
                each for each in known.left_out if not jobs.is_skipped(self._shape, each, step)
            }:
                return f"says that step {step} left out {log.of(step)}, not {set(known.left_out)}"
            assert known.before is not None
            known = known.before
        return ""

    def _may_be_left_out(self) -> Iterator[frozenset[int]]:
        for count in range(self._shape.backup + 1):
            for shards in combinations(range(self._shape.shards), count):
                yield frozenset(shards)


def _back(known: _Known, versions: int) -> _Known:
    """What was so many versions before."""
    for _ in range(versions):
        assert known.before is not None
        known = known.before
    return known
