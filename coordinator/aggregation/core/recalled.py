"""What a range keeps so that the states of nodes can be made again.

It is the states at the newest base (see `phalanx.training.states`) and every version since. Of the
base before it nothing is needed once every range has committed the newer one, which the first
contribution to it proves, as it does for versions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from coordinator.aggregation.core.state import Array, RangeParameters
from coordinator.aggregation.core.versions import Version
from phalanx.errors import DataLoss, InvalidArgument
from phalanx.frames import encode_response
from phalanx.reduction import Node
from phalanx.rounds import check_node
from phalanx.training.states import base_of, hands_in, stateful_nodes, vectors_of
from phalanx.v1 import aggregation_service_pb2 as pb
from phalanx.v1 import training_pb2

Frames = list[Array | None]


class NodeStates:
    """States of one range at its bases, and the versions since the older one of these."""

    def __init__(self, plan: training_pb2.JobPlan, term: int, parameters: RangeParameters) -> None:
        self._plan = plan
        self._term = term
        self._parameters = parameters
        self._vectors = {node: vectors_of(plan, node) for node in stateful_nodes(plan)}
        self._frames = {first: index for index, (first, _) in enumerate(parameters.grid)}
        #: Base → node → the frames of each of its vectors.
        self._states: dict[int, dict[Node, list[Frames]]] = {}
        #: Versions since the oldest base that the range itself does not hold any more.
        self._history: dict[int, Version] = {}

    def take(self, frame: pb.ContributionFrame, payload: memoryview) -> None:
        """Keep a frame of a node's state; the first one counts, others are equal.

        Raises `InvalidArgument` for what is no frame of a state at a base.
        """
        node, version = self._node_of(frame), frame.step + 1
        index = self._frames.get(frame.first_element)
        dtype, grid = self._parameters.dtype, self._parameters.grid
        if not hands_in(self._plan, version):
            raise InvalidArgument(f"states are not handed in with contributions to {frame.step}")
        if not 0 <= frame.state < self._vectors[node]:
            raise InvalidArgument(f"the state of {node} has no vector {frame.state}")
        if index is None or grid[index][1] != frame.element_count:
            raise InvalidArgument(
                f"elements {frame.first_element}+{frame.element_count} are no frame of the range"
            )
        if len(payload) != frame.element_count * dtype.itemsize:
            raise InvalidArgument(f"a frame of a state has {len(payload)} bytes")
        kept = self._of(version, node)[frame.state]
        if kept[index] is None:
            kept[index] = np.frombuffer(payload, dtype)

    def require(self, frame: pb.ContributionFrame) -> None:
        """Raise `InvalidArgument` if a contribution comes without the state that goes with it.

        So a base is never committed before all states at it are here.
        """
        version = frame.step + 1
        if not hands_in(self._plan, version):
            return
        node = self._node_of(frame)
        if not self._is_whole(version, node):
            raise InvalidArgument(
                f"the state of {node} at version {version} has to come before its contribution"
            )

    def keep_before(self, version: int) -> None:
        """The versions below are about to be dropped, since all ranges have committed `version`."""
        base, store = base_of(self._plan, version), self._parameters.versions
        for number in store.held:
            held = store.get(number)
            if held is not None and base <= number < version:
                self._history[number] = held
        for known in (self._states, self._history):
            for old in [number for number in known if number < base]:
                del known[old]

    def messages(self, recall: pb.Recall) -> Iterator[bytes]:
        """What a worker has asked for, as far as it is there."""
        for asked in recall.nodes:
            node = check_node(asked, self._plan.shards)
            if node in self._states.get(recall.version, ()) and self._is_whole(
                recall.version, node
            ):
                yield from self._state_messages(recall.version, node)
        version = self._version(recall.version) if recall.parameters else None
        for frame in version.frames if version is not None else ():
            assert frame is not None
            yield frame

    def vectors(self, version: int) -> dict[str, list[Array]]:
        """What a checkpoint of `version` has to keep, by name, frame by frame."""
        base = base_of(self._plan, version)
        kept: dict[str, list[Array]] = {}
        for node, vectors in self._states.get(base, {}).items():
            for index, frames in enumerate(vectors):
                kept[_state_name(base, node, index)] = [each for each in frames if each is not None]
        for number in range(base, version):
            held = self._version(number)
            assert held is not None, "every version since the base is kept"
            kept[_version_name(number)] = [each for each in held.values if each is not None]
        return kept

    def load(self, version: int, vectors: Mapping[str, Array]) -> None:
        """Take over what a checkpoint of `version` kept. Raises `DataLoss`."""
        base = base_of(self._plan, version)
        for node, count in self._vectors.items() if base else ():
            self._states.setdefault(base, {})[node] = [
                list(self._cut(vectors, _state_name(base, node, index))) for index in range(count)
            ]
        for number in range(base, version):
            frames = self._cut(vectors, _version_name(number))
            self._history[number] = self._parameters.versions.whole_of(number, frames)

    def _node_of(self, frame: pb.ContributionFrame) -> Node:
        node = check_node(frame.node, self._plan.shards)
        if node not in self._vectors:
            raise InvalidArgument(f"{node} has no state: this job's nodes are others")
        return node

    def _of(self, version: int, node: Node) -> list[Frames]:
        states = self._states.setdefault(version, {})
        if node not in states:
            empty: Frames = [None] * len(self._frames)
            states[node] = [list(empty) for _ in range(self._vectors[node])]
        return states[node]

    def _is_whole(self, version: int, node: Node) -> bool:
        vectors = self._states.get(version, {}).get(node)
        return vectors is not None and all(each is not None for all_ in vectors for each in all_)

    def _version(self, number: int) -> Version | None:
        held = self._history.get(number) or self._parameters.versions.get(number)
        return held if held is not None and held.whole else None

    def _state_messages(self, version: int, node: Node) -> Iterator[bytes]:
        header = pb.ExchangeResponseHeader()
        frame = header.frame
        frame.term, frame.version = self._term, version
        frame.range = self._parameters.piece.index
        frame.node.first, frame.node.span = node
        for index, frames in enumerate(self._states[version][node]):
            frame.state = index
            grid = self._parameters.grid
            for values, (first, count) in zip(frames, grid, strict=True):
                assert values is not None
                frame.first_element, frame.element_count = first, count
                yield encode_response(header, values.data)

    def _cut(self, vectors: Mapping[str, Array], name: str) -> list[Array]:
        vector, parameters = vectors.get(name), self._parameters
        length = parameters.piece.element_count
        if vector is None or vector.dtype != parameters.dtype or len(vector) != length:
            raise DataLoss(f"range {parameters.piece.index} has no vector {name!r} that fits it")
        return [vector[first : first + count] for first, count in parameters.grid]


def _state_name(base: int, node: Node, index: int) -> str:
    return f"state/{base}/{node.first}/{index}"


def _version_name(number: int) -> str:
    return f"version/{number}"
