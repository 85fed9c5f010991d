"""Owed nodes, their parts, and what survives a change of placement."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.reduction import Node, cover
from phalanx.v1 import training_pb2
from worker.core.rounds import Fold, Part, PartState, Round, shard_mask

GoRecord = training_pb2.GoRecord
GO = GoRecord(term=1, version=3, action=GoRecord.ACTION_TRAIN)


def _round(width: int, slots: int = 2) -> Round:
    return Round(GO, width, slots)


def _finish(round: Round, part: Part, absent: frozenset[int] = frozenset()) -> list[Any]:
    stop = min(part.node.first + part.node.span, round.width)
    shards = [shard for shard in range(part.node.first, stop) if shard not in absent]
    mask = sum(1 << (shard - part.node.first) for shard in shards)
    return round.done(part, len(shards), float(sum(shards)), mask, ())


def _text(fold: Fold | None) -> str:
    """A sum as text, so that its grouping shows."""
    if fold is None:
        return "nothing"
    if isinstance(fold, Part):
        return f"{fold.node.first}+{fold.node.span}"
    return f"({_text(fold[0])} {_text(fold[1])})"


def test_a_node_is_ready_when_all_of_its_parts_are() -> None:
    round = _round(8)
    parts = round.owe([Node(0, 8)])
    assert [part.node for part in parts] == [Node(0, 4), Node(4, 4)]
    assert {part.slot for part in parts} == {0, 1}
    assert _finish(round, parts[1]) == []
    (wire,) = _finish(round, parts[0])
    assert wire.node == Node(0, 8)
    assert _text(wire.fold) == "(0+4 4+4)"
    assert (wire.totals.count, wire.totals.loss, wire.totals.mask) == (8, 28.0, 255)


def test_absent_parts_pass_through() -> None:
    round = _round(8)
    parts = round.owe([Node(0, 8)])
    _finish(round, parts[0], frozenset({0, 1, 2, 3}))
    (wire,) = _finish(round, parts[1], frozenset({5}))
    assert _text(wire.fold) == "4+4"
    assert wire.totals.mask == 0b11010000
    assert wire.totals.count == 3
    assert shard_mask(wire.node, wire.totals.mask, 8) == bytes([0b11010000])


def test_a_node_without_any_shard_present_is_sent_too() -> None:
    round = _round(2, slots=1)
    (part,) = round.owe([Node(0, 2)])
    (wire,) = _finish(round, part, frozenset({0, 1}))
    assert wire.ready
    assert wire.fold is None
    assert shard_mask(wire.node, 0, 2) == b"\x00"


def test_a_grown_placement_uses_what_is_done() -> None:
    round = _round(8, slots=1)
    (part,) = round.owe([Node(0, 4)])
    _finish(round, part)
    new = round.owe([Node(0, 4), Node(4, 2)])
    assert [each.node for each in new] == [Node(4, 2)]
    _finish(round, new[0])
    new = round.owe([Node(0, 8)])
    assert [each.node for each in new] == [Node(6, 2)]
    (wire,) = _finish(round, new[0])
    assert _text(wire.fold) == "(0+4 (4+2 6+2))"


def test_a_shrunk_placement_drops_what_nobody_wants() -> None:
    round = _round(8)
    first, second = round.owe([Node(0, 8)])
    first.state = second.state = PartState.RUNNING
    assert round.owe([Node(0, 4)]) == []
    assert round.needs(first)
    assert not round.needs(second)
    (wire,) = _finish(round, first)
    assert wire.node == Node(0, 4)


def test_a_part_that_runs_is_not_cut_when_less_of_it_is_owed() -> None:
    round = _round(8, slots=1)
    (part,) = round.owe([Node(0, 8)])
    part.state = PartState.RUNNING
    assert round.owe([Node(0, 2)]) == []
    (wire,) = _finish(round, part)
    assert wire.node == Node(0, 8)


def test_a_complete_node_is_still_delivered_after_it_moved_away() -> None:
    round = _round(8, slots=1)
    (part,) = round.owe([Node(0, 4)])
    (wire,) = _finish(round, part)
    round.owe([Node(4, 4)])
    assert round.wires[Node(0, 4)] is wire


def test_failed_parts_wait_for_control_and_go_to_another_slot() -> None:
    round = _round(4)
    parts = round.owe([Node(0, 4)])
    _finish(round, parts[0])
    parts[1].state = PartState.FAILED
    assert not round.skip([1])
    new = round.owe([Node(0, 4)])
    assert [part.node for part in new] == [Node(2, 1), Node(3, 1)] or [
        part.node for part in new
    ] == [Node(3, 1), Node(2, 1)]


def test_a_single_failed_shard_changes_its_slot() -> None:
    round = _round(4)
    (part,) = round.owe([Node(1, 1)])
    part.state = PartState.FAILED
    (again,) = round.owe([Node(1, 1)])
    assert again.slot != part.slot


def test_a_skipped_shard_frees_its_failed_part() -> None:
    round = _round(4)
    parts = round.owe([Node(0, 4)])
    parts[1].state = PartState.FAILED
    assert round.skip([2])
    assert round.absent == {2}


@settings(deadline=None)
@given(data=st.data(), width=st.integers(1, 33), slots=st.integers(1, 4))
def test_any_placements_and_any_order_deliver_all_owed_shards_in_canonical_grouping(
    data: st.DataObject, width: int, slots: int
) -> None:
    round = _round(width, slots)
    pending: list[Part] = []
    owed: list[Node] = []
    for _ in range(data.draw(st.integers(1, 4))):
        first, stop = sorted((data.draw(st.integers(0, width)), data.draw(st.integers(0, width))))
        owed = cover(first, stop, width)
        running = [part for part in pending if part.state is PartState.RUNNING]
        pending = running + round.owe(owed)
        for part in list(pending):
            action = data.draw(st.sampled_from(["wait", "run", "done", "fail"]))
            if action == "run":
                part.state = PartState.RUNNING
            elif action == "done":
                pending.remove(part)
                _finish(round, part)
            elif action == "fail":
                pending.remove(part)
                part.state = PartState.FAILED
    pending = [part for part in pending if part.state is PartState.RUNNING] + round.owe(owed)
    for part in data.draw(st.permutations(pending)):
        _finish(round, part)
    for node in owed:
        around = [wire for wire in round.wires.values() if wire.ready and _covers(wire.node, node)]
        assert around, f"{node} is owed and not ready"
        for wire in around:
            assert _is_canonical(wire.fold, wire.node, width)
            assert wire.totals.count == min(wire.node.span, width - wire.node.first)


def _covers(outer: Node, inner: Node) -> bool:
    return outer.first <= inner.first and inner.first + inner.span <= outer.first + outer.span


def _is_canonical(fold: Fold | None, node: Node, width: int) -> bool:
    """Whether a sum is grouped as the tree says (all shards being present)."""
    if isinstance(fold, Part):
        only_left = node
        while only_left != fold.node and only_left.right.first >= width:
            only_left = only_left.left
        return only_left == fold.node
    if fold is None:
        return False
    if node.right.first >= width:
        return _is_canonical(fold, node.left, width)
    return _is_canonical(fold[0], node.left, width) and _is_canonical(fold[1], node.right, width)


def test_only_whole_units_travel_and_each_is_one_part() -> None:
    round = Round(GO, 7, 3, unit=2)
    parts = round.owe([Node(0, 4), Node(5, 1)])
    assert sorted(part.node for part in parts) == [Node(0, 2), Node(2, 2), Node(4, 2)]
    for part in parts:
        (wire,) = _finish(round, part)
        assert (wire.node, wire.fold) == (part.node, part)


def test_copies_are_of_whole_units_too() -> None:
    round = Round(GO, 8, 1, unit=2)
    round.owe([Node(0, 2)])
    copies = round.owe_copies([Node(3, 1), Node(1, 1), Node(4, 1), Node(5, 1)])
    assert sorted(part.node for part in copies) == [Node(2, 2), Node(4, 2)]
    assert not round.wires[Node(0, 2)].copy
    assert round.wires[Node(2, 2)].copy


def test_a_unit_that_is_done_stays_when_others_are_owed() -> None:
    round = Round(GO, 4, 1, unit=1)
    first, _ = round.owe([Node(0, 2)])
    _finish(round, first)
    assert round.owe([Node(1, 1), Node(2, 2)]) != []
    assert sorted(round.wires) == [Node(0, 1), Node(1, 1), Node(2, 1), Node(3, 1)]
    assert round.wires[Node(0, 1)].ready
