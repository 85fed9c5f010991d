"""All-reduce jobs that keep their best evaluation: every member has it, whoever dies."""

from __future__ import annotations

import json
import random
from functools import cache

import numpy as np
import pytest

from phalanx.errors import DataLoss
from phalanx.frames import BLOCK_ELEMENTS, decode_response
from phalanx.training.best import BEST_VECTOR
from phalanx.v1 import storage_service_pb2 as storage
from phalanx.v1 import training_pb2
from tests.simulation.planting import Change, Mutant, planted
from tests.unit.worker.all_reduce_cluster import Cluster, Member, plan_of, reference, spec_of
from worker.core import effects as do
from worker.core.all_reduce.replica import NONE, Replica

pytestmark = pytest.mark.slow

STEPS, BEST = 4, 2
LOSSES = {1: 5.0, 2: 3.0, 3: 3.0, 4: 6.0}
NAMES = ["w0", "w1", "w2"]
EVENTS_MAX = 700
"""More than any run here takes."""


def plan_with(metric: str = "test/loss", elements: int = BLOCK_ELEMENTS + 8):
    spec = spec_of(STEPS)
    spec.train.evaluation.split = "test"
    spec.train.evaluation.every_steps = 1
    if metric:
        spec.output.best.metric = metric
    plan = plan_of(spec, shards=5, elements=elements)
    plan.evaluation_shards, plan.evaluation_rows = 1, 4
    plan.evaluation_sums.append("loss")
    return plan


PLAN = plan_with()
GoRecord = training_pb2.GoRecord


def cluster_of(seed: int, plan: training_pb2.JobPlan = PLAN, names: list[str] = NAMES) -> Cluster:
    job = Cluster(seed, plan, names)
    job.evaluated = {version: 4 * loss for version, loss in LOSSES.items()}
    return job


@cache
def version(number: int) -> np.ndarray:
    return reference(PLAN, STEPS)[number]


def ends_with_the_best(job: Cluster, why=None) -> None:
    """The last checkpoint, on which all members agree, holds the last version and the best one."""
    assert job.run(events=EVENTS_MAX), why
    assert job.versions == {STEPS}, why
    (root,) = (each for each in job.members.values() if each.core.root is not None)
    assert root.stored[-1] == STEPS, why
    for member in job.members.values():
        assert member.failures == [], why
        kept = member.copies[STEPS]
        np.testing.assert_array_equal(kept["parameters"], version(STEPS), str(why))
        np.testing.assert_array_equal(kept[BEST_VECTOR], version(BEST), str(why))
    record = root.core.replica.record
    assert (record.best_version, json.loads(record.root_state)["best"]["step"]) == (BEST, BEST)


def dies_before(event: int, victim: str, seed: int) -> bool:
    """Kill a member before one event and go on with the others; whether the death was in time."""
    job = cluster_of(seed)
    job.run(events=event)
    if job.ended:
        return False
    job.kill(victim)
    job.change(list(job.members))
    ends_with_the_best(job, (event, victim, seed))
    return True


@pytest.mark.parametrize("names", [NAMES[:1], NAMES[:2], NAMES, [*NAMES, "w3", "w4"]])
def test_every_member_keeps_the_best_version(names: list[str]) -> None:
    for seed in range(3):
        job = cluster_of(seed, names=names)
        ends_with_the_best(job, seed)
        first = next(iter(job.members.values()))
        assert first.stored == [1, 2, STEPS], "each better version is checkpointed"
        assert BEST_VECTOR not in first.copies[BEST], "it is the best one itself"


@pytest.mark.parametrize("victim", NAMES)
def test_a_death_before_any_event_loses_nothing_of_it(victim: str) -> None:
    event = 0
    while dies_before(event, victim, seed=event):
        event += 2
    assert event > 80


def test_members_that_join_are_sent_the_best_version_too() -> None:
    handed = 0
    for seed in range(24):
        job = cluster_of(seed)
        job.run(events=10 + 7 * seed)
        if job.ended:
            continue
        job.change([*NAMES, "w3"])
        ends_with_the_best(job, seed)
        handed += job.delivered[f"state {BEST_VECTOR}"]
    assert handed > 4


def test_a_second_death_while_a_term_begins() -> None:
    for seed in range(24):
        chosen = random.Random(seed)
        job = cluster_of(seed, names=[*NAMES, "w3"])
        job.run(events=chosen.randrange(120))
        for _ in range(2):
            job.kill(chosen.choice(list(job.members)))
            job.change(list(job.members))
            job.run(events=chosen.randrange(12))
        ends_with_the_best(job, seed)


PLANTED = (
    Change(  # what comes along with a version is not taken for the best one
        "worker.core.all_reduce.replica:Replica.taken_over",
        "self._vectors(frame.version) | self._best_to_come(frame.record, frame.version)",
        "self._vectors(frame.version) | dict.fromkeys(['best'], np.zeros(self._size, self.dtype))",
    ),
    Change(  # a version is kept only if it was known to be the best one before it was here
        "worker.core.all_reduce.replica:Replica.remember", "self._hold_best()", "pass"
    ),
)


@pytest.mark.parametrize("change", PLANTED, ids=["not-taken", "not-at-once"])
def test_planted_bugs_are_found(change: Change) -> None:
    with planted(Mutant("best", 13, (change,), None)), pytest.raises(AssertionError):
        for seed in range(20):
            dies_before(20 + seed, NAMES[seed % 3], seed)


# Members that are behind


def replica_at(number: int) -> Replica:
    """A replica that has come to a version by itself and has heard of no record."""
    arena: dict[int, np.ndarray] = {}
    size = PLAN.layout.element_count
    replica = Replica(PLAN, lambda buffer: arena.setdefault(buffer, np.zeros(size, np.float32)))
    replica.initialise(5)
    for step in range(number):
        gradient = np.full(size, step + 1, np.float32)
        assert replica.reduced(step, 0, size, gradient, 20, 1.0)
        while not replica.work():
            pass
    return replica


def brought_up(replica: Replica, holder: Replica) -> None:
    for message in holder.hand_over(1, replica.version):
        header, payload = decode_response(message)
        here = replica.taken_over(header.state, payload)
        while replica.works and not replica.work():
            pass
    assert here or replica.version == holder.version


@pytest.mark.parametrize("behind", [1, 0])
@pytest.mark.parametrize("known", [1, 2])
def test_one_that_is_behind_hears_what_was_best_before_it_goes_on(behind: int, known: int) -> None:
    """Its shards were copied by others, and the record of the step was still on its way."""
    holder = replica_at(1)
    first = holder.parameters.copy()
    holder.remember(GoRecord(version=1, root_state="{}", best_version=1))
    assert holder.reduced(1, 0, PLAN.layout.element_count, None, 0, 0.0)
    while not holder.work():
        pass
    assert holder.version == 2
    if known == 2:
        holder.remember(GoRecord(version=2, root_state="{}", best_version=1))
    late = replica_at(behind)
    brought_up(late, holder)
    for replica in (holder, late):
        assert replica.version == 2
        np.testing.assert_array_equal(replica.copy()[BEST_VECTOR], first)


def test_nothing_is_kept_where_nothing_is_held_any_more() -> None:
    replica = replica_at(1)
    replica.remember(GoRecord(version=1, root_state="{}", best_version=1))
    replica.forget()
    assert replica.record is None
    replica.initialise(5)
    assert BEST_VECTOR not in replica.copy()


# From a checkpoint


def checkpoint_of(member: Member, number: int) -> tuple[dict[str, np.ndarray], str]:
    record = member.core.replica._records[number]
    return member.copies[number], record.root_state


def restored(job: Cluster, vectors: dict[str, np.ndarray], root_state: str, number: int) -> None:
    """Have the root begin with a checkpoint, as it does where nobody holds anything."""
    (root,) = (each for each in job.members.values() if each.core.root is not None)
    state = {name: vector for name, vector in vectors.items() if name != "parameters"}
    root.take(root.core.restored(number, vectors["parameters"], state, root_state))


def ready(job: Cluster) -> Cluster:
    """All members have said that they hold nothing, and the root is to load a checkpoint."""
    asked: list[do.Restore] = []
    for member in job.members.values():
        member.core._restore = storage.CheckpointManifest(step=3)
        take = member.take

        def taken(effects, take=take):
            asked.extend(each for each in effects if isinstance(each, do.Restore))
            take([each for each in effects if not isinstance(each, do.Restore)])

        member.take = taken
    assert job.run(until=lambda: bool(asked), events=EVENTS_MAX) or asked
    return job


@pytest.fixture(scope="module")
def saved() -> tuple[dict[str, np.ndarray], str]:
    """A checkpoint of version 3, the best version being another one."""
    plan = plan_with()
    spec = spec_of(STEPS, every=3)
    spec.train.evaluation.split, spec.train.evaluation.every_steps = "test", 1
    spec.output.best.metric = "test/loss"
    plan.spec = spec.SerializeToString()
    job = cluster_of(1, plan)
    assert job.run(events=EVENTS_MAX)
    return checkpoint_of(job.members["w0"], 3)


def test_all_members_go_on_from_a_checkpoint_with_it(saved) -> None:
    assert BEST_VECTOR in saved[0]
    job = ready(cluster_of(5))
    restored(job, *saved, 3)
    ends_with_the_best(job)
    assert job.delivered[f"state {BEST_VECTOR}"], "the others were sent it"


def test_a_job_that_goes_on_with_another_rule_keeps_nothing_of_it(saved) -> None:
    job = ready(cluster_of(5, plan_with(metric="")))
    restored(job, *saved, 3)
    assert job.run(events=EVENTS_MAX)
    for member in job.members.values():
        assert member.failures == []
        assert BEST_VECTOR not in member.copies[STEPS]


def test_a_checkpoint_that_lacks_it_is_refused(saved) -> None:
    vectors, root_state = saved
    arena: dict[int, np.ndarray] = {}
    size = PLAN.layout.element_count
    replica = Replica(PLAN, lambda n: arena.setdefault(n, np.zeros(size, np.float32)))
    state = {name: vector for name, vector in vectors.items() if name != "parameters"}
    del state[BEST_VECTOR]
    with pytest.raises(DataLoss, match="no vector 'best'"):
        replica.load(3, vectors["parameters"], state, root_state)
    with pytest.raises(DataLoss, match="cannot be read"):
        replica.load(3, vectors["parameters"], state, '{"best": {}}')
    assert replica.version == NONE
