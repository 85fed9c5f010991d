"""Nodes over slots."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.reduction import Node, cover
from worker.core.division import contains, divide, shard_count, units_around


def _shards(nodes: list[Node], width: int) -> list[int]:
    return [s for node in nodes for s in range(node.first, min(node.first + node.span, width))]


@settings(deadline=None)
@given(
    width=st.integers(1, 70),
    bounds=st.tuples(st.integers(0, 70), st.integers(0, 70)),
    slots=st.integers(1, 9),
    start=st.integers(0, 5),
)
def test_every_shard_goes_to_one_slot_and_shares_are_equal(
    width: int, bounds: tuple[int, int], slots: int, start: int
) -> None:
    first, stop = sorted(min(bound, width) for bound in bounds)
    nodes = cover(first, stop, width)
    pieces = divide(nodes, slots, width, start)
    assert len(pieces) == slots
    loads = [len(_shards(owned, width)) for owned in pieces]
    assert max(loads) <= -(-(stop - first) // slots)
    assert sorted(s for owned in pieces for s in _shards(owned, width)) == list(range(first, stop))
    for owned in pieces:
        assert all(any(contains(node, piece) for node in nodes) for piece in owned)


def test_large_pieces_stay_whole() -> None:
    assert divide([Node(0, 16)], 2, 16) == [[Node(0, 8)], [Node(8, 8)]]
    assert divide([Node(0, 16)], 1, 16) == [[Node(0, 16)]]
    assert sum(map(len, divide([Node(0, 16)], 3, 16))) == 5


def test_a_retry_meets_another_slot() -> None:
    assert divide([Node(2, 1)], 2, 4, start=0) == [[Node(2, 1)], []]
    assert divide([Node(2, 1)], 2, 4, start=1) == [[], [Node(2, 1)]]


def test_the_right_edge_counts_only_shards_that_exist() -> None:
    assert shard_count(Node(4, 4), 5) == 1
    assert divide([Node(0, 8)], 2, 5) == [[Node(0, 2), Node(4, 4)], [Node(2, 2)]]


def test_units_are_never_split() -> None:
    units = units_around([Node(0, 8)], 4, 7)
    assert units == [Node(0, 4), Node(4, 4)]
    assert divide(units, 3, 7, grain=4) == [[Node(0, 4)], [Node(4, 4)], []]


def test_units_around_nodes_are_whole_and_each_comes_once() -> None:
    assert units_around([Node(2, 1), Node(3, 1), Node(6, 2)], 4, 9) == [Node(0, 4), Node(4, 4)]
    assert units_around([Node(8, 8)], 4, 9) == [Node(8, 4)]
    assert units_around([Node(0, 4)], 1, 3) == [Node(0, 1), Node(1, 1), Node(2, 1)]
    assert units_around([], 2, 9) == []
