"""The canonical tree gives the same bits whatever the order and whoever computed what."""

import gc
import itertools
import random
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.errors import InvalidArgument
from phalanx.reduction import (
    Node,
    TreeReducer,
    children_present,
    cover,
    full_mask,
    reduce_leaves,
    root,
)


def payloads(width: int, seed: int) -> dict[int, np.ndarray]:
    """Vectors of very different sizes, so that the order of additions shows in the bits."""
    rng = np.random.default_rng(seed)
    return {
        shard: (rng.standard_normal(16) * 10.0 ** rng.integers(-4, 4)).astype(np.float32)
        for shard in range(width)
    }


def node_sum(values: dict[int, np.ndarray], node: Node, width: int) -> np.ndarray | None:
    """What a worker that hosts exactly this node delivers."""
    sub = {s: values[s] for s in range(node.first, min(node.first + node.span, width))}
    inner = TreeReducer(node.span) if node.span > 1 else None
    if inner is None:
        return values[node.first]
    for shard, value in sub.items():
        inner.fill(Node(shard - node.first, 1), value, 1)
    for shard in range(len(sub), node.span):
        inner.fill(Node(shard, 1), None, 0)
    return inner.result[0]


@given(width=st.integers(1, 70), seed=st.integers(0, 2**32))
@settings(max_examples=80, deadline=None)
def test_any_cut_and_any_order_give_the_bits_of_the_reference(width: int, seed: int) -> None:
    values = payloads(width, seed)
    draw = random.Random(seed)
    cuts = sorted({0, width, *(draw.randint(0, width) for _ in range(draw.randint(0, 8)))})
    nodes = [n for a, b in itertools.pairwise(cuts) for n in cover(a, b, width)]
    arrivals = [*nodes, *draw.choices(nodes, k=3)]
    draw.shuffle(arrivals)
    reducer = TreeReducer(width)
    for node in arrivals:
        reducer.fill(node, node_sum(values, node, width), full_mask(node, width))
    total, mask = reducer.result
    expected = reduce_leaves(values, width)
    assert total is not None
    assert expected is not None
    assert total.tobytes() == expected.tobytes()
    assert mask == (1 << width) - 1


def test_summing_in_arrival_order_gives_other_bits() -> None:
    values = payloads(50, 3)
    expected = reduce_leaves(values, 50)
    assert expected is not None
    different = 0
    for seed in range(10):
        order = list(values)
        random.Random(seed).shuffle(order)
        running = values[order[0]].copy()
        for shard in order[1:]:
            running += values[shard]
        different += running.tobytes() != expected.tobytes()
    assert different == 10


def test_a_missing_right_child_passes_through_and_keeps_negative_zero() -> None:
    reducer = TreeReducer(3)
    minus_zero = np.array([-0.0], np.float32)
    for shard in range(2):
        reducer.fill(Node(shard, 1), None, 0)
    reducer.fill(Node(2, 1), minus_zero, 1)
    total, mask = reducer.result
    assert total is not None
    assert np.signbit(total[0])
    assert mask == 0b100


def test_a_filled_node_ignores_later_values_and_frees_its_descendants() -> None:
    reducer = TreeReducer(4)
    ones = np.ones(2)
    assert reducer.fill(Node(0, 1), ones, 1)
    assert reducer.fill(Node(0, 2), ones * 5, 3)
    assert not reducer.fill(Node(1, 1), ones * 7, 1)
    assert not reducer.fill(Node(0, 2), ones * 9, 3)
    assert reducer.fill(Node(2, 2), ones, 3)
    total, _ = reducer.result
    assert total is not None
    assert total.tolist() == [6.0, 6.0]
    assert not reducer.fill(Node(0, 4), ones, 15)


def test_inputs_are_never_written_to() -> None:
    values = payloads(9, 1)
    kept = {shard: value.copy() for shard, value in values.items()}
    for value in values.values():
        value.flags.writeable = False
    reducer = TreeReducer(9)
    for shard in (8, 3, 1, 0, 2, 7, 6, 5, 4):
        reducer.fill(Node(shard, 1), values[shard], 1)
    assert reducer.complete
    assert all(np.array_equal(values[s], kept[s]) for s in values)


@given(width=st.integers(1, 40), data=st.data())
@settings(max_examples=150, deadline=None)
def test_absent_shards_and_overlapping_nodes_change_nothing_but_the_mask(
    width: int, data: st.DataObject
) -> None:
    values = payloads(width, width)
    absent = data.draw(st.sets(st.integers(0, width - 1)))
    present: dict[int, np.ndarray | None] = {
        shard: None if shard in absent else value for shard, value in values.items()
    }
    top = root(width)
    nodes = [
        Node(first, span)
        for span in itertools.takewhile(lambda s: s <= top.span, (1 << i for i in range(7)))
        for first in range(0, width, span)
    ]
    arrivals = data.draw(st.lists(st.sampled_from(nodes), max_size=12))
    arrivals += data.draw(st.permutations([Node(shard, 1) for shard in range(width)]))
    reducer = TreeReducer(width)
    for node in arrivals:
        shards = range(node.first, min(node.first + node.span, width))
        value = reduce_leaves({s - node.first: present[s] for s in shards}, node.span)
        mask = sum(1 << (s - node.first) for s in shards if s not in absent)
        reducer.fill(node, value, mask)
    total, mask = reducer.result
    expected = reduce_leaves(present, width)
    assert mask == sum(1 << shard for shard in range(width) if shard not in absent)
    assert (total is None) == (expected is None)
    if total is not None and expected is not None:
        assert total.tobytes() == expected.tobytes()


def test_numbers_are_reduced_like_vectors() -> None:
    losses = {shard: 0.1 * (shard + 1) for shard in range(11)}
    reducer = TreeReducer(11)
    for shard in reversed(losses):
        reducer.fill(Node(shard, 1), losses[shard], 1)
    arrays = {shard: np.array([loss]) for shard, loss in losses.items()}
    expected = reduce_leaves(arrays, 11)
    assert expected is not None
    assert reducer.result[0] == expected[0]
    assert reducer.result[0] != sum(losses.values())


def test_descendants_of_a_filled_node_are_let_go() -> None:
    reducer = TreeReducer(8)
    below = np.ones(3)
    watched = weakref.ref(below)
    reducer.fill(Node(1, 1), below, 1)
    reducer.fill(Node(4, 1), np.ones(3), 1)
    del below
    gc.collect()
    assert watched() is not None
    reducer.fill(Node(0, 4), np.ones(3), 15)
    gc.collect()
    assert watched() is None
    assert not reducer.complete
    assert not reducer.fill(Node(2, 1), np.ones(3), 1)
    assert reducer.fill(Node(5, 1), np.ones(3), 1)


def test_values_of_another_length_or_type_are_refused() -> None:
    reducer = TreeReducer(4)
    reducer.fill(Node(0, 1), np.ones(3, np.float32), 1)
    with pytest.raises(InvalidArgument, match=r"float32 of shape \(1,\), the nodes before it"):
        reducer.fill(Node(1, 1), np.ones(1, np.float32), 1)
    with pytest.raises(InvalidArgument, match="float64 of shape"):
        reducer.fill(Node(1, 1), np.ones(3, np.float64), 1)
    assert reducer.fill(Node(1, 1), np.ones(3, np.float32), 1)


def test_nodes_outside_the_tree_and_wrong_masks_are_refused() -> None:
    reducer = TreeReducer(5)
    with pytest.raises(InvalidArgument, match="outside a tree over 5 shards"):
        reducer.fill(Node(8, 1), np.ones(1), 1)
    with pytest.raises(InvalidArgument, match="names shards outside"):
        reducer.fill(Node(4, 4), np.ones(1), 0b10)
    with pytest.raises(InvalidArgument, match="value exactly if"):
        reducer.fill(Node(0, 1), None, 1)
    with pytest.raises(InvalidArgument, match="power of two"):
        Node(2, 4)


@given(width=st.integers(1, 100), data=st.data())
@settings(deadline=None)
def test_a_cover_is_exact_aligned_and_minimal(width: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, width))
    stop = data.draw(st.integers(first, width))
    nodes = cover(first, stop, width)
    shards = [s for n in nodes for s in range(n.first, min(n.first + n.span, width))]
    assert shards == list(range(first, stop))
    for left, right in itertools.pairwise(nodes):
        mergeable = left.span == right.span and left.parent == right.parent
        assert not mergeable


def test_root_and_children() -> None:
    assert root(1) == Node(0, 1)
    assert root(5) == Node(0, 8)
    assert children_present(Node(4, 4), 5) == (Node(4, 2),)
    assert Node(6, 2).parent == Node(4, 4)
    assert Node(3, 1).is_leaf
    assert not Node(0, 2).is_leaf
    assert cover(0, 5, 5) == [Node(0, 8)]
    assert cover(3, 3, 5) == []
    for first, stop in ((-1, 2), (2, 6), (3, 2)):
        with pytest.raises(InvalidArgument, match="do not lie within"):
            cover(first, stop, 5)
    with pytest.raises(InvalidArgument, match="at least 1 shard"):
        root(0)
