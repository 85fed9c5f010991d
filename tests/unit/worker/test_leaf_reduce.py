"""The reduction inside a leaf process equals the reference to the last bit."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.reduction import Node, TreeReducer, cover, reduce_leaves
from worker.leaf.reduce import Scratch, Sums, page_aligned, reduce_node

COUNT = 7


def _payload(shard: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    values = np.random.default_rng(shard).standard_normal(COUNT) * 10.0 ** (shard % 7)
    return values.astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 40),
    bounds=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    absent=st.sets(st.integers(0, 40)),
)
def test_parts_add_up_to_the_reference(
    width: int, bounds: tuple[int, int], absent: set[int]
) -> None:
    calls: list[int] = []

    def leaf(shard: int, out: np.ndarray) -> Sums:
        calls.append(shard)
        if shard in absent:
            return Sums(0, 0.0, 0)
        out[:] = _payload(shard)
        return Sums(shard, 0.1 * shard, 1)

    first, stop = sorted(min(bound, width) for bound in bounds)
    nodes = cover(0, first, width) + cover(first, stop, width) + cover(stop, width, width)
    scratch = Scratch(COUNT, np.dtype(np.float32))
    tree = TreeReducer(width)
    losses = TreeReducer(width)
    total = 0
    for node in nodes:
        out = page_aligned(COUNT, np.dtype(np.float32))
        sums = reduce_node(node, width, leaf, out, scratch)
        total += sums.count
        tree.fill(node, out if sums.mask else None, sums.mask)
        losses.fill(node, np.array([sums.loss]) if sums.mask else None, sums.mask)
    assert calls == list(range(width))
    present = {s: _payload(s) for s in range(width) if s not in absent}
    expected = reduce_leaves(present, width)
    value, mask = tree.result
    assert mask == sum(1 << shard for shard in present)
    assert total == sum(present)
    if expected is None:
        assert value is None
    else:
        assert value is not None
        assert value.tobytes() == expected.tobytes()
        loss = reduce_leaves({s: np.array([0.1 * s]) for s in present}, width)
        assert losses.result[0] is not None
        assert loss is not None
        assert losses.result[0].tobytes() == loss.tobytes()


def test_few_buffers_are_enough() -> None:
    def leaf(shard: int, out: np.ndarray) -> Sums:
        out[:] = shard
        return Sums(1, 0.0, 1)

    scratch = Scratch(COUNT, np.dtype(np.float32))
    reduce_node(Node(0, 64), 64, leaf, page_aligned(COUNT, np.dtype(np.float32)), scratch)
    assert len(scratch._buffers) == 6
