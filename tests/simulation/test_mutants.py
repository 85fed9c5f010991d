"""Bugs that are planted into the code that ships are found, each by a seed that is known for it.

The seeds come from `python -m tests.simulation.hunt`. Where the code changes so much that a mutant
does not fit any more, or that its seed takes another way, this says so: hunt again.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from phalanx.testing.simulation.loop import SimulationFailed
from tests.simulation.cluster import services
from tests.simulation.mutants import MUTANTS
from tests.simulation.planting import Change, Mutant, function_at, planted
from tests.simulation.scenarios import scenarios, told_of

pytestmark = pytest.mark.slow

SEEDS_TRIED = 20
"""Another version of Python has other traces, and then one of the next seeds shows the bug."""

RULES = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}
"""Rules of the data plane that what is built so far has to keep."""


@pytest.fixture(scope="module")
def given():
    with services() as made:
        yield made


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_a_planted_bug_is_found(given, mutant):
    assert mutant.known is not None, "hunt a seed for it"
    first = mutant.known.seed
    tried = (replace(mutant.known, seed=seed) for seed in range(first, first + SEEDS_TRIED))
    with planted(mutant):
        found = any(known.run(given).failure for known in tried)
    assert found, f"{mutant.known} and the seeds after it do not find it; hunt again"


@pytest.mark.parametrize("name", [name for name in scenarios() if name.startswith("known/")])
def test_the_same_scenario_finds_nothing_in_what_ships(given, name):
    outcome = scenarios()[name].run(given)
    assert outcome.failure == "", told_of(name, outcome)


def test_every_rule_has_a_mutant():
    assert {mutant.rule for mutant in MUTANTS} - {0} == RULES == set(range(1, 17))
    assert len(MUTANTS) >= 20
    for mutant in MUTANTS:
        with planted(mutant):
            pass  # each fits the code that ships


def test_a_mutant_that_does_not_fit_says_so():
    where = "storage.core.leases:check_fence"
    mutant = Mutant("nowhere", 0, (Change(where, "no such text", ""),), None)
    code = function_at(where).__code__
    with pytest.raises(LookupError, match="adapt the mutant"), planted(mutant):
        pass
    assert function_at(where).__code__ is code
    assert issubclass(SimulationFailed, AssertionError)
