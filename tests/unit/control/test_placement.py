"""Placement: pure functions from workers and shards to who hosts what."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.control.core import tree
from coordinator.control.core.placement import (
    loads,
    place_first,
    place_members,
    place_orphans,
    rebalance,
)
from phalanx import reduction

WORKERS = st.dictionaries(
    st.sampled_from([f"w{n}" for n in range(8)]), st.integers(1, 8), min_size=1, max_size=8
)
WIDTHS = st.integers(1, 130)


def vectors(owners: dict[int, str], width: int) -> int:
    return sum(
        tree.node_count([shard for shard in owners if owners[shard] == worker], width)
        for worker in set(owners.values())
    )


@given(width=WIDTHS, first=st.integers(0, 129), count=st.integers(0, 130))
def test_nodes_are_aligned_disjoint_and_exact(width: int, first: int, count: int) -> None:
    first, stop = min(first, width), min(first + count, width)
    nodes = tree.cover(first, stop, width)
    covered: list[int] = []
    for node_first, span in nodes:
        assert span & (span - 1) == 0
        assert node_first % span == 0
        covered += range(node_first, min(node_first + span, width))
    assert covered == list(range(first, stop))
    assert len(nodes) <= 2 * max(1, width.bit_length())


@given(width=WIDTHS, first=st.integers(0, 129), count=st.integers(0, 130))
@settings(deadline=None)
def test_nodes_are_those_of_the_reduction_tree(width: int, first: int, count: int) -> None:
    first, stop = min(first, width), min(first + count, width)
    expected = [(node.first, node.span) for node in reduction.cover(first, stop, width)]
    assert tree.cover(first, stop, width) == expected


@given(width=WIDTHS, shards=st.sets(st.integers(0, 129)))
def test_nodes_and_shards_are_inverse(width: int, shards: set[int]) -> None:
    shards = {shard for shard in shards if shard < width}
    assert tree.shards_of(tree.nodes_of(shards, width), width) == shards


@given(width=WIDTHS, slots=WORKERS)
@settings(deadline=None)
def test_the_first_placement_is_whole_and_proportional(width: int, slots: dict[str, int]) -> None:
    placed = place_first(width, slots)
    assert set(placed.owners) == set(range(width))
    total = sum(slots.values())
    slowest = max(count / slots[worker] for worker, count in loads(placed.owners, slots).items())
    best = max(1 / max(slots.values()), width / total)
    assert slowest <= 1.1 * (best + 1)


@pytest.mark.parametrize(
    ("width", "slots", "counts", "most_vectors"),
    [
        (16, {"a": 1, "b": 1}, [8, 8], 2),
        (16, {"a": 1, "b": 1, "c": 1}, [6, 4, 6], 6),
        (16, {"a": 2, "b": 2, "c": 2, "d": 2}, [4, 4, 4, 4], 4),
        (16, {"a": 3, "b": 1}, [12, 4], 3),
        (2, {"a": 1, "b": 1, "c": 1}, [1, 1], 2),
        (64, {f"w{n}": 1 for n in range(5)}, [12, 14, 12, 12, 14], 16),
    ],
)
def test_few_vectors_cross_the_wire(
    width: int, slots: dict[str, int], counts: list[int], most_vectors: int
) -> None:
    placed = place_first(width, slots)
    assert sorted(each for each in loads(placed.owners, slots).values() if each) == sorted(counts)
    assert vectors(placed.owners, width) <= most_vectors


@pytest.mark.parametrize(
    ("width", "slots", "counts", "most_vectors"),
    [
        (8, [1] * 4, [2, 2, 2, 2], 4),
        (8, [1] * 5, [2, 2, 2, 1, 1], 5),
        (8, [1] * 6, [2, 2, 1, 1, 1, 1], 6),
        (8, [1] * 7, [2, 1, 1, 1, 1, 1, 1], 7),
        (8, [1] * 9, [1, 1, 1, 1, 1, 1, 1, 1, 0], 8),
        (9, [1] * 8, [1, 2, 1, 1, 1, 1, 1, 1], 8),
        (4, [1] * 3, [2, 1, 1], 3),
        # One with a whole sub-tree each would be slower than the best.
        (8, [1] * 3, [3, 2, 3], 6),
        (8, [1, 2, 1], [2, 4, 2], 3),
        (32, [1] * 5, [6, 7, 6, 6, 7], 14),
    ],
)
def test_as_many_members_have_shards_as_can_at_no_cost(
    width: int, slots: list[int], counts: list[int], most_vectors: int
) -> None:
    workers = {f"w{number}": count for number, count in enumerate(slots)}
    owners = place_members(width, workers)
    counted = loads(owners, workers)
    assert sorted(counted.values()) == sorted(counts)
    assert set(owners) == set(range(width))
    assert vectors(owners, width) <= most_vectors
    assert (counted["w1"] == max(counts)) or len(set(slots)) == 1


@given(width=WIDTHS, slots=WORKERS, unit=st.sampled_from([1, 2, 4]))
@settings(deadline=None, max_examples=50)
def test_members_are_no_slower_for_being_more(width: int, slots: dict[str, int], unit: int) -> None:
    def slowest(owners: dict[int, str]) -> float:
        return max(count / slots[worker] for worker, count in loads(owners, slots).items())

    first, owners = place_first(width, slots, unit).owners, place_members(width, slots, unit)
    assert set(owners) == set(range(width))
    assert slowest(owners) <= 1.1 * slowest(first)
    assert all(len({owners[each] for each in range(at, min(at + unit, width))}) == 1
               for at in range(0, width, unit))  # fmt: skip


@given(width=WIDTHS, slots=WORKERS, dead=st.sampled_from([f"w{n}" for n in range(8)]))
@settings(deadline=None)
def test_a_death_moves_only_the_shards_of_the_dead(
    width: int, slots: dict[str, int], dead: str
) -> None:
    placed = place_first(width, slots)
    living = {worker: slots[worker] for worker in slots if worker != dead}
    kept = {shard: worker for shard, worker in placed.owners.items() if worker != dead}
    orphans = set(placed.owners) - set(kept)
    after = place_orphans(kept, orphans, width, living)
    if living:
        assert set(after.owners) == set(range(width))
        assert set(after.owners.values()) <= set(living)
    assert after.moved == (orphans if living else set())
    assert all(after.owners[shard] == worker for shard, worker in kept.items())


@given(width=WIDTHS, slots=WORKERS, newcomer=st.integers(1, 8))
@settings(deadline=None)
def test_a_join_moves_shards_to_the_newcomer_only(
    width: int, slots: dict[str, int], newcomer: int
) -> None:
    placed = place_first(width, slots)
    joined = {**slots, "new": newcomer}
    after = rebalance(placed.owners, width, joined, ["new"])
    for shard, worker in after.owners.items():
        assert worker in (placed.owners[shard], "new")
    taken = loads(after.owners, joined)["new"]
    assert len(after.moved) == taken
    assert taken <= -(-width * newcomer // sum(joined.values()))
    assert not rebalance(after.owners, width, joined, ["new"]).moved


def test_workers_that_failed_at_a_shard_get_it_last() -> None:
    owners = {0: "a", 1: "b", 2: "c"}
    avoided = {3: frozenset(("a", "b"))}
    slots = {"a": 1, "b": 1, "c": 1}
    assert place_orphans(owners, [3], 4, slots, avoided=avoided).owners[3] == "c"
    assert place_orphans(owners, [3], 4, {"a": 1}, avoided=avoided).owners[3] == "a"


def test_a_shard_goes_back_to_who_still_holds_it() -> None:
    result = place_orphans({0: "a"}, [1], 2, {"a": 1, "b": 9}, preferred={1: "a"})
    assert result.owners[1] == "a"


def test_every_decision_tells_its_reason() -> None:
    assert place_first(4, {"a": 1}).reason.endswith(": 1 vector")
    assert place_first(4, {}).reason == "no worker to place shards on"
    assert "least load" in place_orphans({}, [0], 1, {"a": 1}).reason
    assert rebalance({0: "a"}, 1, {"a": 1}, ["a"]).reason == "already balanced"


def test_a_newcomer_gets_its_share_though_the_slowest_has_nothing_to_give() -> None:
    owners = dict.fromkeys(range(8), "busy") | {5: "slow"}
    slots = {"slow": 1 / 8, "busy": 1, "new": 1}
    after = rebalance(owners, 8, slots, ["slow", "busy", "new"])
    assert loads(after.owners, slots) == {"slow": 1, "busy": 4, "new": 3}
    assert not rebalance(after.owners, 8, slots, ["slow", "busy", "new"]).moved


def units_whole(owners: dict[int, str], width: int, unit: int) -> bool:
    return all(owners[shard] == owners[shard - shard % unit] for shard in range(width))


def test_units_are_placed_moved_and_balanced_whole() -> None:
    width, unit, slots = 22, 4, {"a": 1, "b": 1, "c": 2}
    placed = place_first(width, slots, unit)
    assert units_whole(placed.owners, width, unit)
    kept = {shard: worker for shard, worker in placed.owners.items() if worker != "c"}
    orphans = set(range(width)) - set(kept)
    after = place_orphans(kept, orphans, width, {"a": 1, "b": 1}, unit=unit)
    assert units_whole(after.owners, width, unit)
    joined = {"a": 1, "b": 1, "d": 1}
    balanced = rebalance(after.owners, width, joined, ["d"], unit)
    assert balanced.moved
    assert units_whole(balanced.owners, width, unit)


def test_a_tree_of_one_unit_has_one_host() -> None:
    assert set(place_first(3, {"a": 1, "b": 1}, 4).owners) == {0, 1, 2}
    assert len(set(place_first(3, {"a": 1, "b": 1}, 4).owners.values())) == 1
