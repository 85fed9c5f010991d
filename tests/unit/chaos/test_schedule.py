"""Which faults are drawn: reproducible, in the wanted proportions, one per period."""

from collections import Counter

import pytest

from phalanx.chaos.schedule import FAULTS, JITTER, draw, faults_named
from phalanx.errors import InvalidArgument


def test_a_seed_gives_one_schedule():
    mix = faults_named([])
    assert draw(mix, 5, 60, seed=1) == draw(mix, 5, 60, seed=1)
    assert draw(mix, 5, 60, seed=1) != draw(mix, 5, 60, seed=2)


def test_the_default_mix_keeps_its_proportions_in_every_sixteen_faults():
    planned = draw(faults_named([]), 5, 160, seed=3)
    for first in (0, 16):
        counted = Counter(each.fault.name for each in planned[first : first + 16])
        assert counted == {
            "kill-worker": 8,
            "pause-worker": 4,
            "slow-worker": 2,
            "kill-control": 1,
            "kill-aggregator": 1,
        }


def test_each_period_has_one_fault_and_time_to_recover():
    planned = draw(faults_named([]), 5, 61, seed=4)
    assert len(planned) == 12
    for period, each in enumerate(planned):
        assert period * 5 <= each.at_s <= (period + JITTER) * 5


def test_a_repeated_name_counts_more():
    mix = faults_named(["kill-worker", "kill-worker", "pause-storage"])
    counted = Counter(each.fault.name for each in draw(mix, 1, 30, seed=0))
    assert counted == {"kill-worker": 20, "pause-storage": 10}


def test_an_unknown_fault_is_refused_with_the_known_ones():
    with pytest.raises(InvalidArgument, match=r"meteor.*kill-worker"):
        faults_named(["kill-worker", "meteor"])


def test_the_choice_of_the_victim_does_not_depend_on_the_order_of_the_list():
    for planned in draw(faults_named([]), 1, 50, seed=5):
        assert planned.choose(["a", "b", "c"]) == planned.choose(["c", "a", "b"])
    chosen = {each.choose(["a", "b", "c"]) for each in draw(faults_named([]), 1, 50, seed=5)}
    assert chosen == {"a", "b", "c"}


def test_only_a_kill_is_over_at_once():
    assert {name for name, fault in FAULTS.items() if not fault.lasts_s} == {
        name for name in FAULTS if name.startswith("kill-")
    }
