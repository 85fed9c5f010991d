"""Placement by measured speed: the pure functions."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from coordinator.control.core import tree
from coordinator.control.core.levels import GAIN_LEAST, MOVES_MAX, Pace, level, slowest
from coordinator.control.core.placement import loads, place_first
from coordinator.control.core.speeds import EQUAL_WITHIN, SHORT_LEAF_S, Speed, factors, usual_leaf_s

NAMES = [f"w{n}" for n in range(6)]
WIDTHS = st.integers(1, 80)
SLOTS = st.dictionaries(st.sampled_from(NAMES), st.integers(1, 4), min_size=2, max_size=6)
FACTORS = st.lists(
    st.sampled_from([0.1, 0.25, 0.5, 1.0, 1.0, 1.0, 3.0]), min_size=6, max_size=6
).map(lambda found: dict(zip(NAMES, found, strict=True)))


def paced(slots: dict[str, int], factor: dict[str, float], **costs: float) -> Pace:
    return Pace(slots, {worker: factor[worker] for worker in slots}, **costs)


def times(owners: dict[int, str], pace: Pace) -> list[float]:
    return [pace.time(worker, count, 0) for worker, count in loads(owners, pace.slots).items()]


@given(width=WIDTHS, slots=SLOTS, factor=FACTORS, vector=st.sampled_from([0.0, 0.1, 2.0]))
@settings(deadline=None)
def test_a_step_gets_clearly_shorter_or_nothing_moves(
    width: int, slots: dict[str, int], factor: dict[str, float], vector: float
) -> None:
    pace = paced(slots, factor, vector=vector)
    owners = place_first(width, slots).owners
    found = level(owners, width, pace)
    assert set(found.placement.owners) == set(range(width))
    assert set(found.placement.owners.values()) <= set(slots)
    assert found.after == pytest.approx(slowest(found.placement.owners, width, pace))
    if found.placement.moved:
        assert found.after <= (1 - GAIN_LEAST) * slowest(owners, width, pace) + 1e-9
        changed = {s for s in owners if owners[s] != found.placement.owners[s]}
        assert found.placement.moved == changed
    else:
        assert found.placement.owners == owners


@given(width=st.integers(8, 80), slots=SLOTS, factor=FACTORS)
@settings(deadline=None)
def test_the_slowest_is_within_a_leaf_of_the_best(
    width: int, slots: dict[str, int], factor: dict[str, float]
) -> None:
    """One more leaf at the fastest worker, and the gain below which nothing moves."""
    pace = paced(slots, factor)
    owners = place_first(width, slots).owners
    for _ in range(8):
        owners = level(owners, width, pace).placement.owners
    most = max(slots.values())
    bound = (width + most * len(slots)) / sum(slots[each] * factor[each] for each in slots)
    bound = max(bound, 1 / max(factor[each] for each in slots))
    fastest = min(1 / factor[each] for each in slots)
    assert max(times(owners, pace)) <= (bound + fastest) / (1 - GAIN_LEAST) + 1e-9


@given(width=WIDTHS, slots=SLOTS, factor=FACTORS, vector=st.sampled_from([0.0, 0.3]))
@settings(deadline=None)
def test_what_was_levelled_stays(
    width: int, slots: dict[str, int], factor: dict[str, float], vector: float
) -> None:
    pace = paced(slots, factor, vector=vector)
    owners = place_first(width, slots).owners
    seen = [slowest(owners, width, pace)]
    for _ in range(40):
        found = level(owners, width, pace)
        if not found.placement.moved:
            break
        owners = found.placement.owners
        assert found.after < seen[-1] * (1 - GAIN_LEAST) + 1e-9
        seen.append(found.after)
    assert not level(owners, width, pace).placement.moved


@given(width=st.integers(1, 20), slots=SLOTS, factor=FACTORS, unit=st.sampled_from([2, 4]))
@settings(deadline=None)
def test_units_move_whole(
    width: int, slots: dict[str, int], factor: dict[str, float], unit: int
) -> None:
    owners = place_first(width, slots, unit).owners
    assume(all(owners[shard] == owners[shard - shard % unit] for shard in owners))
    after = level(owners, width, paced(slots, factor), unit, unit_travels=True).placement.owners
    assert all(after[shard] == after[shard - shard % unit] for shard in after)


def test_one_worker_that_is_four_times_slower_gets_a_quarter() -> None:
    slots = dict.fromkeys(["a", "b", "c", "d"], 1)
    owners = place_first(16, slots).owners
    found = level(owners, 16, Pace(slots, {"a": 1.0, "b": 1.0, "c": 0.25, "d": 1.0}))
    assert loads(found.placement.owners, slots) == {"a": 5, "b": 5, "c": 1, "d": 5}
    assert (found.before, found.after) == (16.0, 5.0)
    assert len(found.placement.moved) == 3, "nobody else's shards move"
    assert "5.00 leaves instead of 16.00" in found.placement.reason


def test_vectors_that_cost_more_than_leaves_are_not_cut() -> None:
    slots = {"a": 1, "b": 1}
    owners = place_first(16, slots).owners
    cheap = level(owners, 16, Pace(slots, {"a": 1.0, "b": 0.25})).placement.owners
    assert loads(cheap, slots) == {"a": 13, "b": 3}
    dear = level(owners, 16, Pace(slots, {"a": 1.0, "b": 0.25}, vector=4.0)).placement.owners
    held = {name: [s for s in dear if dear[s] == name] for name in slots}
    assert sum(tree.node_count(shards, 16) for shards in held.values()) <= 3


def test_shards_go_where_their_data_is() -> None:
    slots = dict.fromkeys(["a", "b", "c"], 1)
    owners = {shard: "abc"[shard // 4] for shard in range(12)}
    pace = Pace(slots, {"a": 0.25, "b": 1.0, "c": 1.0})
    for had in ("b", "c"):
        found = level(owners, 12, pace, had={1: [had]})
        assert found.placement.owners[1] == had


def test_a_gain_that_moving_eats_up_is_none() -> None:
    slots = {"a": 1, "b": 1}
    owners = {shard: "ab"[shard // 4] for shard in range(8)}
    factor = {"a": 0.5, "b": 1.0}
    assert level(owners, 8, Pace(slots, factor)).placement.moved
    assert not level(owners, 8, Pace(slots, factor, move=3.0)).placement.moved
    everywhere = dict.fromkeys(range(8), ("a", "b"))
    assert level(owners, 8, Pace(slots, factor, move=3.0), had=everywhere).placement.moved


def test_so_many_nodes_move_at_once() -> None:
    slots = dict.fromkeys([f"w{n:03}" for n in range(100)], 1)
    owners = place_first(800, slots).owners
    factor = {name: 0.25 if name < "w050" else 1.0 for name in slots}
    found = level(owners, 800, Pace(slots, factor, move=1.0))
    assert len(found.placement.moved) <= 8 * MOVES_MAX


def measured(*means: tuple[int, float]) -> Speed:
    speed, leaves, seconds = Speed(), 0, 0.0
    for beat, (count, leaf_s) in enumerate(means):
        leaves, seconds = leaves + count, seconds + count * leaf_s
        speed.told(leaves, seconds, 0.5 * beat)
    return speed


def test_a_measure_needs_some_leaves_and_follows_the_newest() -> None:
    assert not measured((2, 0.1)).known
    assert measured((2, 0.1), (2, 0.1)).leaf_s == pytest.approx(0.1)
    slower = measured((10, 0.1), *[(5, 0.4)] * 8)
    assert slower.leaf_s == pytest.approx(0.4, rel=0.1)
    assert measured((100, 0.1), (100, 1.0)).leaf_s < 0.5, "one heartbeat says little"


def test_a_worker_that_began_anew_is_measured_anew() -> None:
    speed = measured((100, 1.0))
    speed.told(3, 0.3, 9.0)
    assert speed.leaf_s == pytest.approx(0.1)


def test_small_differences_are_none_and_large_ones_count() -> None:
    slots = dict.fromkeys("abcd", 1)
    speeds = {
        name: measured((9, leaf_s)) for name, leaf_s in zip("abc", (0.1, 0.12, 0.4), strict=True)
    }
    found = factors(speeds, slots, 1.0)
    assert found["a"] == found["b"] == found["d"] == 1.0
    assert found["c"] == pytest.approx(0.12 / 0.4)
    assert usual_leaf_s(speeds, slots) == pytest.approx(0.12)


@given(st.lists(st.floats(0.1, 0.1 * EQUAL_WITHIN), min_size=1, max_size=6))
def test_noise_within_the_band_leaves_all_equal(leaf_s: list[float]) -> None:
    speeds = {name: measured((9, each)) for name, each in zip(NAMES, leaf_s, strict=False)}
    slots = dict.fromkeys(speeds, 1)
    assert set(factors(speeds, slots, 1.0).values()) == {1.0}


def test_leaves_that_take_hardly_any_time_tell_nothing_of_a_worker() -> None:
    slots = {"a": 1, "b": 1}
    for leaf_s, wanted in ((SHORT_LEAF_S, 1.0), (2 * SHORT_LEAF_S, 0.1)):
        speeds = {"a": measured((9, leaf_s / 10)), "b": measured((9, leaf_s))}
        assert factors(speeds, slots, 1.0)["b"] == pytest.approx(wanted)


def test_what_was_measured_long_ago_is_forgotten() -> None:
    speeds = {"a": measured((9, 0.1)), "b": measured((9, 1.0))}
    slots = {"a": 1, "b": 1}
    found = []
    for now_s in (1.0, 16.0, 30.0, 300.0):
        speeds["a"].changed_s = now_s
        found.append(factors(speeds, slots, now_s)["b"])
    assert found[0] == found[1] == pytest.approx(0.1)
    assert 0.1 < found[2] < 1.0
    assert found[3] == 1.0
