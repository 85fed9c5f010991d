"""Time that processes agree on: no age is ever more than what has really passed."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.core.elapsed import Elapsed, Look, advance, now_s, stamp_s


class Processes:
    """Some processes with clocks of their own, one row, and the real time."""

    def __init__(self):
        self.real_s = 1000.0
        self.row = None
        self.looks = {}
        self.tokens = 0

    def clock_s(self, process):
        return self.real_s + 10_000.0 * process

    def start(self, process):
        self.looks.pop(process, None)
        self.look(process, durable=True)

    def look(self, process, durable):
        self.tokens += 1
        last = self.looks.get(process)
        row, look = advance(self.row, last, self.clock_s(process), str(self.tokens))
        if durable:
            self.row = row
            self.looks[process] = look

    def stamp_s(self, process):
        return stamp_s(self.row, self.looks[process], self.clock_s(process))

    def now_s(self, process):
        return now_s(self.row, self.looks[process], self.clock_s(process))


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("wait"), st.integers(1, 100)),
        st.tuples(st.just("look"), st.integers(0, 2)),
        st.tuples(st.just("lost"), st.integers(0, 2)),
        st.tuples(st.just("start"), st.integers(0, 2)),
        st.tuples(st.just("stamp"), st.integers(0, 2)),
        st.tuples(st.just("ask"), st.integers(0, 2)),
    ),
    max_size=60,
)


@settings(max_examples=500)
@given(STEPS)
def test_no_age_is_more_than_what_has_passed(steps):
    world = Processes()
    for process in range(3):
        world.start(process)
    stamps = []
    for step, value in steps:
        if step == "wait":
            world.real_s += value
        elif step == "look":
            world.look(value, durable=True)
        elif step == "lost":
            world.look(value, durable=False)
        elif step == "start":
            world.start(value)
        elif step == "stamp":
            stamps.append((world.real_s, world.stamp_s(value)))
        else:
            for real_s, stamp in stamps:
                assert world.now_s(value) - stamp <= world.real_s - real_s + 1e-9


@given(st.lists(st.integers(1, 20), min_size=3, max_size=3), st.integers(1, 20))
def test_time_goes_on_where_all_look_in_turn(gaps, rounds):
    world = Processes()
    for process in range(3):
        world.start(process)
    began = world.real_s
    for _ in range(rounds):
        for process, gap in enumerate(gaps):
            world.real_s += gap
            world.look(process, durable=True)
    # One adds, the others note; what is not added yet is less than a round, at both ends.
    assert world.row.elapsed_s >= world.real_s - began - 2 * sum(gaps)


def test_a_stamp_counts_what_another_process_has_not_added_yet():
    world = Processes()
    world.start(0)
    world.start(1)
    world.look(1, durable=True)
    world.real_s += 100
    world.look(0, durable=True)  # notes the token of the other one
    world.real_s += 5
    stamp, stamped_s = world.stamp_s(0), world.real_s
    world.real_s += 10
    world.look(1, durable=True)  # adds all of it
    assert world.now_s(1) - stamp <= world.real_s - stamped_s


def test_alone_ages_are_exact():
    world = Processes()
    world.start(0)
    stamp = world.stamp_s(0)
    world.real_s += 90
    assert world.now_s(0) - stamp == 90
    world.look(0, durable=True)
    world.real_s += 10
    assert world.now_s(0) - stamp == 100


def test_while_nobody_runs_nothing_ages():
    world = Processes()
    world.start(0)
    stamp = world.stamp_s(0)
    world.real_s += 1000
    world.start(1)
    assert world.now_s(1) - stamp == 0


def test_a_clock_that_goes_back_takes_nothing_away():
    row, last = Elapsed(50.0, "a"), Look("a", 100.0, 100.0)
    assert advance(row, last, 90.0, "b")[0] == Elapsed(50.0, "b")
    assert stamp_s(row, last, 90.0) == pytest.approx(50.0)
