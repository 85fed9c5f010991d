"""Which leaves an audit compares, and whom that catches."""

from __future__ import annotations

import pytest

from tests.unit.aggregation.voters import (
    SECRET,
    SHARDS,
    TRAIN,
    Lie,
    Voters,
    final_bytes,
    verified_plan,
)


def audited(seed: int, lie: Lie = lambda *_: False, fraction: float = 0.5) -> Voters:
    plan = verified_plan(audit=fraction, steps=8, evaluation_shards=0)
    voters = Voters(plan, lie=lie, seed=seed)
    voters.run()
    return voters


def test_an_audit_compares_about_the_fraction_and_always_the_same_leaves() -> None:
    counts = {audited(seed).verified for seed in range(3)}
    assert len(counts) == 1, "arrival decides nothing"
    assert 10 < counts.pop() < 31, "of 8 × 5, and the parameters"
    assert audited(0, fraction=1.0).verified == 1 + 8 * SHARDS
    assert audited(0, fraction=1e-9).verified == 1, "the parameters are always compared"


def drawn_leaves(secret: int, steps: int) -> list[frozenset[int]]:
    """The leaves of each training round that an audit compares."""
    plan = verified_plan(audit=0.5, steps=steps, evaluation_shards=0)
    voters = Voters(plan, secret=secret)
    voters.run()
    drawn = [
        {shard for version, shard in voters.ever_asked if version == at} for at in range(steps)
    ]
    return [frozenset(each) for each in drawn]


@pytest.mark.parametrize("other", [SECRET + 1, SECRET + (1 << 64)])
def test_who_does_not_know_the_whole_secret_cannot_tell_what_an_audit_draws(other: int) -> None:
    known = drawn_leaves(SECRET, 16)
    assert drawn_leaves(SECRET, 16) == known
    same = sum(ours == theirs for ours, theirs in zip(known, drawn_leaves(other, 16), strict=True))
    assert same <= 4, "of 16, each alike once in 32 times by chance"


def test_every_leaf_is_drawn_by_an_audit_sooner_or_later() -> None:
    """Else a worker could lie for ever about one that is not."""
    drawn = drawn_leaves(SECRET, 100)
    assert len(set(drawn)) > 2**SHARDS / 2, "of so many ways to draw"
    for shard in range(SHARDS):
        assert 25 < sum(shard in each for each in drawn) < 75, "half of them, within 5 σ"


def test_an_audit_catches_a_liar_and_leaves_it_out_of_what_was_drawn() -> None:
    voters = audited(1, lambda name, go, _: name == "w3" and go.action == TRAIN)
    assert [each.worker_id for each in voters.caught] == ["w3"]
    honest = audited(1)
    assert honest.job.vector(8).tobytes() == final_bytes(honest.job.plan)
