"""The late-shard rule: when copies are asked for, of whom, and when not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.copies import (
    COPIES_MAX,
    PATIENCE_UNMEASURED_S,
    Copies,
    OpenRound,
    Order,
)
from phalanx.reduction import Node, nodes_of_mask, shards_mask

TRAIN, EVALUATE = 2, 3
WIDTH = 12
HOMES = {"w1": range(4), "w2": range(4, 8), "w3": range(8, 12)}


def mask_of(shards: Iterable[int]) -> int:
    return sum(1 << shard for shard in shards)


class Rounds:
    """Scripted rounds in virtual time."""

    def __init__(self, homes: dict[str, Iterable[int]] = HOMES) -> None:
        self.copies = Copies()
        self.homes = {name: mask_of(shards) for name, shards in homes.items()}
        self.now_s = 50.0
        self.version = 0
        self.missing = 0
        self.away = False
        for name in self.homes:
            self.copies.stream_opened(name, takes_copies=True)

    def open(self, action: int = TRAIN) -> bool:
        self.version += 1
        self.missing = (1 << WIDTH) - 1
        key = (self.version, 0)
        return self.copies.turn(
            OpenRound(key, action, WIDTH, lambda: self.missing if key[0] == self.version else 0),
            self.now_s,
        )

    def deliver(self, worker: str, shards: int | None = None, *, copy: bool = False) -> None:
        mask = self.homes[worker] if shards is None else shards
        for node in nodes_of_mask(mask, WIDTH):
            key = (self.version, 0)
            self.copies.frame(worker, key, node, copy=copy, now_s=self.now_s)
        self.missing &= ~mask

    def whole(self, leaf_s: float = 0.01, action: int = TRAIN, *without: str) -> None:
        """A round in which everybody delivers."""
        self.open(action)
        self.now_s += leaf_s
        for name in self.homes:
            if name not in without:
                self.deliver(name)

    def look(self, after_s: float = 0.0) -> list[Order]:
        self.now_s += after_s
        orders, self.told = self.copies.look(self.now_s, control_away=self.away)
        return orders


def shards_of(orders: list[Order]) -> set[int]:
    mask = shards_mask((node for order in orders for node in order.nodes), WIDTH)
    return {shard for shard in range(WIDTH) if mask >> shard & 1}


@pytest.fixture
def measured() -> Rounds:
    """Five whole rounds of 10 ms: shards are late after 120 ms."""
    rounds = Rounds()
    for _ in range(5):
        rounds.whole()
    return rounds


def late_round(rounds: Rounds, late: str = "w2") -> list[Order]:
    """A round in which one worker delivers nothing; what was asked for once that was late."""
    rounds.open()
    rounds.now_s += 0.01
    for name in rounds.homes:
        if name != late:
            rounds.deliver(name)
    return rounds.look(0.115)


def test_late_shards_are_copied_by_those_who_are_through(measured: Rounds) -> None:
    measured.open()
    assert measured.copies.patience_s() == pytest.approx(0.12)
    measured.now_s += 0.01
    measured.deliver("w1")
    measured.deliver("w3")
    assert not measured.look(0.105), "115 ms are not late yet"
    orders = measured.look(0.01)
    assert shards_of(orders) == set(HOMES["w2"])
    assert {order.worker_id for order in orders} == {"w1", "w3"}
    assert {order.key for order in orders} == {(measured.version, 0)}
    (told,) = measured.told
    assert (told.worker_id, told.cause, told.shards) == ("w2", "late", (4, 5, 6, 7))
    assert told.copied_to == ("w1", "w3")
    assert measured.copies.late_workers(measured.now_s) == {"w2": pytest.approx(0.125)}


def test_nothing_but_its_own_is_asked_of_those_who_are_not_through(measured: Rounds) -> None:
    measured.open()
    orders = measured.look(5.0)
    assert {order.worker_id: shards_of([order]) for order in orders} == {
        name: set(shards) for name, shards in HOMES.items()
    }
    assert measured.told == []
    assert measured.copies.late_workers(measured.now_s) == {}, "all are slow, so nobody is late"
    assert not measured.look(5.0)
    measured.deliver("w1")
    orders = measured.look()
    assert {order.worker_id for order in orders} == {"w1"}
    assert shards_of(orders) == set(HOMES["w2"]), "what is no copy is not waited for"


def test_what_moved_from_each_to_one_that_is_not_heard_of_is_computed_where_it_was(
    measured: Rounds,
) -> None:
    moved = {name: mask_of([max(shards)]) for name, shards in HOMES.items()}
    for round in range(3):
        measured.open()
        measured.now_s += 0.01
        for name in HOMES:
            measured.deliver(name, measured.homes[name] & ~moved[name])
        orders = measured.look(0.2)
        assert shards_of(orders) == {3, 7, 11}
        for order in orders:
            if round == 0:
                assert shards_of([order]) == {max(HOMES[order.worker_id])}
            measured.deliver(order.worker_id, mask_of(shards_of([order])), copy=True)
        assert not measured.missing
        assert measured.copies.late_workers(measured.now_s) == {}


def test_nothing_is_asked_twice_while_it_may_come(measured: Rounds) -> None:
    assert late_round(measured)
    assert not measured.look(0.1)


def test_a_late_copy_is_asked_of_another_but_not_of_all(measured: Rounds) -> None:
    for name in ("w4", "w5", "w6"):
        measured.homes[name] = 0
        measured.copies.stream_opened(name, takes_copies=True)
    asked: dict[int, set[str]] = {shard: set() for shard in HOMES["w2"]}
    orders = late_round(measured)
    for _ in range(10):
        for order in orders:
            for shard in shards_of([order]):
                assert order.worker_id not in asked[shard], "asked the same worker again"
                asked[shard].add(order.worker_id)
        orders = measured.look(0.13)
    assert {len(workers) for workers in asked.values()} == {COPIES_MAX}


@given(
    turns=st.lists(
        st.tuples(st.sampled_from(["look", "w1", "w2", "w3"]), st.floats(0.0, 0.4)), max_size=40
    )
)
@settings(deadline=None)
def test_copies_are_capped_and_leave_homes_alone(turns: list[tuple[str, float]]) -> None:
    """Of a shard so many in a round besides its home's, whoever is late and however long it takes;
    and who owes it is asked for it only after others who owe nothing."""
    rounds = Rounds()
    for _ in range(5):
        rounds.whole()
    rounds.open()
    given_times: Counter[int] = Counter()
    owed = dict(rounds.homes)
    for what, after_s in turns:
        if what != "look":
            rounds.now_s += after_s
            rounds.deliver(what)
            continue
        orders = rounds.look(after_s)
        for order in orders:
            own = shards_of([order]) & set(HOMES[order.worker_id])
            others = [name for name in HOMES if name != order.worker_id]
            free = [name for name in others if not owed[name] & rounds.missing]
            assert not free or all(given_times[shard] for shard in own)
            owed[order.worker_id] |= mask_of(shards_of([order]))
            given_times.update(shards_of([order]) - own)
    assert max(given_times.values(), default=0) <= COPIES_MAX


def test_a_late_worker_costs_one_wait_not_one_in_each_round(measured: Rounds) -> None:
    late_round(measured)
    for _ in range(3):
        assert measured.open(), "look at once"
        orders = measured.look()
        assert shards_of(orders) == set(HOMES["w2"])
        assert not measured.told, "told once"
        measured.now_s += 0.01
        measured.deliver("w1")
        measured.deliver("w3")
        measured.now_s += 0.01
        for order in orders:
            measured.deliver(order.worker_id, mask_of(shards_of([order])), copy=True)


def test_a_worker_that_delivers_all_of_its_home_is_late_no_more(measured: Rounds) -> None:
    late_round(measured)
    measured.whole()
    assert not measured.open()
    assert not measured.look(0.05)
    assert not measured.copies.late_workers(measured.now_s)


def test_a_part_of_its_home_is_not_enough(measured: Rounds) -> None:
    """As over a slow link: the first frames come in time, the others do not."""
    rounds = Rounds()
    for _ in range(5):
        rounds.open()
        rounds.now_s += 0.01
        for name in HOMES:
            for _ in range(3):  # three frames of each node
                rounds.deliver(name)
    late_round(rounds)
    rounds.open()
    rounds.now_s += 0.01
    rounds.deliver("w2")  # one frame
    assert rounds.open()
    assert "w2" in rounds.copies.late_workers(rounds.now_s)


def test_copies_and_slow_ones_do_not_raise_the_patience(measured: Rounds) -> None:
    for _ in range(20):
        orders = late_round(measured)
        for order in orders:
            measured.deliver(order.worker_id, mask_of(shards_of([order])), copy=True)
    measured.open()
    assert measured.copies.patience_s() == pytest.approx(0.12)


def test_the_first_round_and_one_slow_one_are_no_measure() -> None:
    """Code and data are loaded in the first; a lease would be over before twice that time."""
    rounds = Rounds()
    for leaf_s in (3.0, 0.01, 0.01, 2.0, 0.01):
        rounds.whole(leaf_s)
    rounds.open()
    assert rounds.copies.patience_s() == pytest.approx(0.12)


def test_leaves_that_get_longer_for_all_do(measured: Rounds) -> None:
    for _ in range(70):
        measured.whole(leaf_s=0.5)
    measured.open()
    assert measured.copies.patience_s() == pytest.approx(1.1)


def test_without_measurements_only_a_long_time_decides() -> None:
    rounds = Rounds()
    rounds.whole()
    rounds.open()
    rounds.deliver("w1")
    rounds.deliver("w3")
    assert rounds.copies.patience_s() is None
    assert not rounds.look(PATIENCE_UNMEASURED_S - 0.1)
    assert shards_of(rounds.look(0.2)) == set(HOMES["w2"])


def test_a_worker_that_never_delivers_holds_a_new_job_up_once() -> None:
    rounds = Rounds()
    waited_s = []
    for _ in range(6):
        rounds.open()
        opened_s = rounds.now_s
        rounds.now_s += 0.01
        orders = rounds.look()
        for name in ("w1", "w3"):
            rounds.deliver(name)
        if not orders:
            orders = rounds.look(PATIENCE_UNMEASURED_S)
        assert shards_of(orders) == set(HOMES["w2"])
        assert {order.worker_id for order in orders} == {"w1", "w3"}
        for order in orders:
            rounds.deliver(order.worker_id, mask_of(shards_of([order])), copy=True)
        waited_s.append(rounds.now_s - opened_s)
    assert waited_s[0] > PATIENCE_UNMEASURED_S
    assert max(waited_s[1:]) < 0.1
    rounds.whole()
    assert not rounds.open(), "who delivers is not late any more"
    assert not rounds.look(0.05)


def test_evaluations_are_measured_by_themselves(measured: Rounds) -> None:
    for _ in range(4):
        measured.whole(0.4, EVALUATE)
    measured.open(EVALUATE)
    assert measured.copies.patience_s() == pytest.approx(0.9)
    measured.open(TRAIN)
    assert measured.copies.patience_s() == pytest.approx(0.12)


def test_the_shards_of_the_dead_are_left_to_control_while_it_is_there(measured: Rounds) -> None:
    measured.copies.stream_closed("w2")
    measured.open()
    assert not measured.look(0.01)
    measured.away = True
    orders = measured.look()
    assert shards_of(orders) == set(HOMES["w2"])
    assert [told.cause for told in measured.told] == ["lost"]
    assert not measured.copies.late_workers(measured.now_s), "who is gone is not late"


def test_while_control_is_away_each_round_of_the_dead_is_handed_out_at_once(
    measured: Rounds,
) -> None:
    measured.away = True
    measured.copies.stream_closed("w2")
    for _ in range(3):
        assert measured.open()
        orders = measured.look()
        assert shards_of(orders) == set(HOMES["w2"])
        for name in ("w1", "w3"):
            measured.deliver(name)
        for order in orders:
            measured.deliver(order.worker_id, mask_of(shards_of([order])), copy=True)


def test_what_broke_while_control_was_away_is_handed_out_until_control_has_moved_it(
    measured: Rounds,
) -> None:
    measured.away = True
    measured.copies.stream_closed("w2")
    measured.open()
    measured.look()
    measured.away = False  # it is back, and waits a lease for those that nobody claims
    measured.copies.stream_opened("w2", takes_copies=True)  # started again, and hosts nothing
    for _ in range(3):
        measured.now_s += 0.01
        measured.deliver("w1")
        measured.deliver("w3")
        assert measured.open(), "look at once"
        assert shards_of(measured.look()) == set(HOMES["w2"])
    measured.homes = {"w1": mask_of(range(6)), "w3": mask_of(range(6, 12))}
    measured.whole()
    assert not measured.open(), "control has moved them"
    assert not measured.look(0.01)


@pytest.mark.parametrize("away", [False, True])
def test_what_the_dead_had_delivered_of_a_round_is_not_all_of_its_home(
    measured: Rounds, away: bool
) -> None:
    measured.open()
    measured.deliver("w2", mask_of([4, 5]))
    measured.copies.stream_closed("w2")
    measured.away = away
    measured.look()
    measured.open()
    measured.away = True
    assert shards_of(measured.look()) == set(HOMES["w2"])
    assert {told.cause for told in measured.told} <= {"lost"}


def test_a_worker_whose_shards_were_moved_is_late_no_more_whatever_else_it_hosted(
    measured: Rounds,
) -> None:
    measured.whole(0.01, EVALUATE)
    measured.whole()
    late_round(measured)
    assert measured.copies.late_workers(measured.now_s)
    measured.homes = {"w1": mask_of(range(6)), "w3": mask_of(range(6, 12))}
    measured.whole()
    measured.open()
    assert not measured.copies.late_workers(measured.now_s), "no evaluation will come soon"


def test_one_that_is_back_after_its_death_is_not_late(measured: Rounds) -> None:
    measured.away = True
    measured.copies.stream_closed("w2")
    measured.look()
    measured.copies.stream_opened("w2", takes_copies=True)
    measured.open()
    assert shards_of(measured.look()) == set(HOMES["w2"])
    assert not measured.copies.late_workers(measured.now_s)


def test_a_worker_that_is_back_and_delivers_is_handed_out_no_more(measured: Rounds) -> None:
    measured.away = True
    measured.copies.stream_closed("w2")
    measured.open()
    assert shards_of(measured.look()) == set(HOMES["w2"])
    measured.copies.stream_opened("w2", takes_copies=True)
    measured.away = False
    measured.deliver("w2", mask_of([4, 5]))
    assert not measured.open(), "what it hosts now is its own"
    assert not measured.look(0.01)


def test_a_move_by_control_is_learned(measured: Rounds) -> None:
    late_round(measured)
    measured.homes = {"w1": mask_of(range(6)), "w3": mask_of(range(6, 12))}
    measured.whole()
    assert not measured.open(), "nobody's home is late any more"
    assert not measured.look(0.05)


def test_a_taker_that_dies_is_replaced(measured: Rounds) -> None:
    orders = late_round(measured)
    measured.copies.stream_closed("w1")
    again = measured.look()
    assert shards_of(again) == shards_of([each for each in orders if each.worker_id == "w1"])
    assert {order.worker_id for order in again} == {"w3"}


def test_workers_that_take_no_copies_are_not_asked() -> None:
    rounds = Rounds({"w1": range(6), "w2": range(6, 12)})
    rounds.copies.stream_closed("w1")
    rounds.copies.stream_opened("w1", takes_copies=False)
    for _ in range(5):
        rounds.whole()
    assert {order.worker_id for order in late_round(rounds)} == {"w2"}, "only its home is left"
    assert not rounds.copies.late_workers(rounds.now_s)


def test_shards_that_nobody_delivered_before_are_copied_too(measured: Rounds) -> None:
    measured.open()
    measured.now_s += 0.01
    for name in HOMES:
        measured.deliver(name, measured.homes[name] & ~(1 << 4))
    # From now on shard 4 is nobody's.
    measured.open()
    measured.now_s += 0.01
    for name in HOMES:
        measured.deliver(name, measured.homes[name] & ~(1 << 4))
    orders = measured.look(0.2)
    assert shards_of(orders) == {4}
    assert len(orders) == 1


def test_what_moved_to_a_worker_that_is_never_heard_of_is_copied_by_its_last_home() -> None:
    rounds = Rounds({"w1": range(WIDTH)})
    for _ in range(5):
        rounds.whole()
    # Control moves half of it to a worker that opens no stream.
    rounds.homes = {"w1": mask_of(range(6))}
    for round in range(3):
        rounds.open()
        rounds.now_s += 0.01
        orders = rounds.look() if round else []
        rounds.deliver("w1")
        orders = orders or rounds.look(0.12)
        assert shards_of(orders) == set(range(6, WIDTH))
        assert {order.worker_id for order in orders} == {"w1"}
        rounds.deliver("w1", mask_of(range(6, WIDTH)), copy=True)
        assert not rounds.copies.late_workers(rounds.now_s)
    rounds.open()
    assert shards_of(rounds.look()) == set(range(6, WIDTH)), "no more waiting"


def test_a_second_stream_of_a_worker_counts_once(measured: Rounds) -> None:
    measured.copies.stream_opened("w2", takes_copies=True)
    measured.copies.stream_closed("w2")
    measured.away = True
    measured.open()
    assert not measured.look(0.01)


@pytest.mark.parametrize("mask", [0, 1, 0b1011, 0b111100001111, (1 << WIDTH) - 1])
def test_nodes_of_a_mask_are_the_mask(mask: int) -> None:
    nodes = nodes_of_mask(mask, WIDTH)
    assert shards_mask(nodes, WIDTH) == mask
    assert nodes == sorted(nodes)
    assert not mask or all(isinstance(node, Node) for node in nodes)


def test_copies_that_another_range_asked_for_make_their_home_late_here_too() -> None:
    rounds = Rounds()
    for _ in range(5):
        rounds.whole()
    rounds.open()
    rounds.now_s += 0.05
    rounds.deliver("w1")
    rounds.deliver("w3")
    rounds.deliver("w1", rounds.homes["w2"], copy=True)
    rounds.open()
    assert shards_of(rounds.look()) == set(HOMES["w2"]), "at once, without waiting"
    assert set(rounds.copies.late_workers(rounds.now_s)) == {"w2"}


def test_a_copy_of_what_came_from_home_as_well_makes_nobody_late() -> None:
    rounds = Rounds()
    for _ in range(5):
        rounds.whole()
    rounds.open()
    rounds.deliver("w1", rounds.homes["w2"], copy=True)
    for worker in HOMES:
        rounds.deliver(worker)
    rounds.open()
    assert rounds.look() == []
    assert rounds.copies.late_workers(rounds.now_s) == {}


def test_who_is_late_is_asked_where_nobody_else_is_left() -> None:
    """It may be late for another one's sake, whose home it was given and who delivers nothing."""
    rounds = Rounds({"w1": range(6), "w2": range(6, 12)})
    for _ in range(5):
        rounds.whole()
    rounds.open()
    rounds.deliver("w1")
    assert {order.worker_id for order in rounds.look(0.2)} == {"w1"}
    rounds.deliver("w1", mask_of(range(6, 12)), copy=True)
    rounds.open(EVALUATE)
    rounds.deliver("w2", mask_of(range(11)))
    first = rounds.look(PATIENCE_UNMEASURED_S)
    assert [(order.worker_id, shards_of([order])) for order in first] == [("w1", {11})]
    second = rounds.look(PATIENCE_UNMEASURED_S + 0.01)
    assert [(order.worker_id, shards_of([order])) for order in second] == [("w2", {11})]
    assert rounds.look(PATIENCE_UNMEASURED_S + 0.01) == []


def test_who_delivers_the_rest_as_copies_is_not_late_but_what_moved_away_from_it_is() -> None:
    """Control moved a half of w1's home to w2, whose payloads never come."""
    rounds = Rounds({"w1": range(WIDTH)})
    for _ in range(5):
        rounds.whole()
    rounds.copies.stream_opened("w2", takes_copies=True)
    own, moved = mask_of(range(6)), mask_of(range(6, WIDTH))
    rounds.open()
    rounds.deliver("w1", own)
    assert [order.worker_id for order in rounds.look(0.13)] == ["w2"]
    assert "w1" in rounds.copies.late_workers(rounds.now_s), "it might hang"
    assert [order.worker_id for order in rounds.look(0.13)] == ["w1"]
    rounds.deliver("w1", moved, copy=True)
    assert rounds.open(), "look at once"
    assert not rounds.copies.late_workers(rounds.now_s)
    (order,) = rounds.look()
    assert (order.worker_id, shards_of([order])) == ("w1", set(range(6, WIDTH)))


def test_copies_by_others_of_what_came_by_halves_do_not_excuse_a_late_worker() -> None:
    """As over a slow link: the first frame of each node comes from home, the others as copies."""
    rounds = Rounds({"w1": range(6), "w2": range(6, WIDTH)})
    for _ in range(5):
        rounds.open()
        rounds.now_s += 0.01
        for name in ("w1", "w2", "w2"):  # two frames of each node of w2
            rounds.deliver(name)
    rounds.open()
    rounds.deliver("w1")
    rounds.deliver("w2")
    rounds.missing = rounds.homes["w2"]
    assert {order.worker_id for order in rounds.look(0.13)} == {"w1"}
    rounds.deliver("w1", rounds.homes["w2"], copy=True)
    assert rounds.open()
    assert set(rounds.copies.late_workers(rounds.now_s)) == {"w2"}
