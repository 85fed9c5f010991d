"""Jobs whose workers own the parameters, in the simulator: what they are, and what must hold.

Rule 13 of the data plane, looked at from outside: a term starts at the highest version that any of
its members holds; no member makes a version that a machine without faults would not make; each
keeps the gradient of its last step; no step is committed twice unless whoever had it is gone.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from phalanx.testing.simulation.clocks import Environment
from phalanx.v1 import training_pb2
from tests.simulation import jobs, references
from tests.simulation.oracle import Oracle
from tests.simulation.parts import ALL_REDUCE, VERIFIED
from worker.core.all_reduce.job import AllReduceJob
from worker.core.all_reduce.late import LateShards
from worker.core.all_reduce.replica import NONE, Replica
from worker.core.effects import Committed, Points

SHARE = 0.25
"""Part of the swarm's runs in which the jobs are such."""

VANISH, VANISH_SHARE = "range_ahead worker vanish", 0.3
"""In part of these, again and again, a worker is gone with all that it had just sent at the moment
at which one of them is ahead of the others: whoever is behind needs what was kept."""


def drawn(settings: Any, chance: random.Random) -> Any:
    """The settings of a run of the swarm, in some of which workers reduce among themselves."""
    taken = settings.parts or settings.wishes or any(shape.tolerant for shape in settings.shapes)
    if taken or any(shape.parts in VERIFIED for shape in settings.shapes):
        return settings
    if chance.random() >= SHARE:
        return settings
    parts = chance.choice(sorted(ALL_REDUCE))
    shapes = tuple(jobs.composed(shape, parts) for shape in settings.shapes)
    workers = max(settings.workers, chance.choice([1, 2, 3, 4, 5]))
    strike = VANISH if chance.random() < VANISH_SHARE else settings.strike
    return replace(settings, shapes=shapes, workers=workers, strike=strike)


class Members:
    """Everything that members of all-reduce jobs did in one run, and the checks of it."""

    def __init__(self, oracle: Oracle) -> None:
        self.committed = 0
        """Steps that roots committed, those that were computed again included."""
        self.caught_up = 0
        """Members that were one step behind and were sent the gradient that was kept."""
        self.brought_up = 0
        """Members that were sent everything."""
        self.begun_for = 0
        """Roots that took the initial parameters from a member that made them instead."""
        self.copied = 0
        """Copies of late shards that were asked for."""
        self._oracle = oracle
        self._world = oracle.world
        self._shapes: dict[str, jobs.Shape] = {}
        #: Of each term of a job: what its members held when they heard of it.
        self._held: dict[tuple[str, int], dict[str, int]] = {}
        self._newest: dict[tuple[str, int], int] = {}
        self._checked: dict[int, tuple[AllReduceJob, int]] = {}
        self._last: dict[tuple[str, int], int] = {}

    def _what(self, core: AllReduceJob) -> str:
        return f"{core.job_id}: term {core.term}, {core.worker_id}"

    def _shape(self, core: AllReduceJob) -> jobs.Shape:
        plan: training_pb2.JobPlan = core.plan
        if plan.job_id not in self._shapes:
            shape = self._shapes[plan.job_id] = jobs.shape_of(plan)
            self._oracle.fingerprints.setdefault(plan.job_id, shape.fingerprint)
        return self._shapes[plan.job_id]

    # -- terms

    def _settles(self, core: AllReduceJob) -> None:
        held = self._held.setdefault((core.job_id, core.term), {})
        if core.owner is not None and core.worker_id not in held:
            held[core.worker_id] = core.replica.version if core.replica is not None else NONE

    def _starts(self, core: AllReduceJob) -> None:
        """A member holds what the term starts with: the most that any of them had.

        One that had that may hear of the first step of the term before it has heard of all.
        """
        assert core.replica is not None
        version, held = core.replica.version, self._held[core.job_id, core.term]
        best = max(held.get(member, NONE) for member in core._members)
        if best == NONE:
            best = core._restore.step if core._restore is not None else 0
            self.begun_for += core.root is not None and core._holder != core.worker_id
        self._oracle.demand(
            (version == best and held.keys() >= set(core._members)) or self._went_on(core, best),
            f"{self._what(core)} starts at version {version}; its members held {held}",
        )
        self._check(core)

    def _went_on(self, core: AllReduceJob, best: int) -> bool:
        """Whether a member that held what the term starts with was sent the term's first step."""
        replica = core.replica
        assert replica is not None
        held = self._held[core.job_id, core.term].get(core.worker_id, NONE)
        kept = replica._kept
        return held == best == replica.version - 1 and kept is not None and kept.version == best

    # -- versions

    def _check(self, core: AllReduceJob) -> None:
        """What a member holds is what a machine without faults computes."""
        replica = core.replica
        if replica is None or self._checked.get(id(core), (core, NONE))[1] == replica.version:
            return
        version = replica.version
        self._checked[id(core)] = core, version
        if version == NONE:
            return
        shape = self._shape(core)
        expected = {
            "parameters": references.versions(shape)[version],
            **references.state_of(shape, version),
        }
        for name, vector in {"parameters": replica.parameters, **replica._state}.items():
            self._oracle.demand(
                vector.tobytes() == expected[name].tobytes(),
                f"{self._what(core)} has other {name} at version {version} than without faults",
            )
        key = (core.job_id, core.term)
        if version > self._newest.get(key, 0):
            self._newest[key] = version
            # Of the one that is ahead, and of one that is behind, by turns.
            others = [member for member in core._members if member != core.worker_id]
            about = others[-1] if others and version % 2 else core.worker_id
            self._oracle.moments.met("range_ahead", about)

    def _worked(self, core: AllReduceJob, before: int, effects: list[Any]) -> None:
        replica = core.replica
        if replica is not None and replica.version != before:
            kept = replica._kept
            self._oracle.demand(
                kept is not None and kept.version == before,
                f"{self._what(core)} does not keep the gradient of step {before}",
            )
            self._check(core)
        for effect in effects:
            if isinstance(effect, Committed):
                self._commit(core, effect)

    def _commit(self, core: AllReduceJob, effect: Committed) -> None:
        """A step is done, with every example once, and none is done again while it is known."""
        oracle, shape = self._oracle, self._shape(core)
        self.committed += 1
        oracle.commits[core.job_id] = oracle.commits.get(core.job_id, 0) + 1
        steps = jobs.steps_of(shape, effect.version - 1)
        expected = sum(
            jobs.examples(shape, shard, step)
            for shard in range(shape.shards)
            for step in steps
            if not jobs.is_skipped(shape, shard, step)
        )
        oracle.lost += max(0, expected - effect.example_count)
        oracle.doubled += max(0, effect.example_count - expected)
        what = f"{self._what(core)} commits step {effect.version}"
        oracle.demand(
            effect.example_count == expected, f"{what} of {effect.example_count} examples"
        )
        # Those of the term before may go on until they hear of this one.
        before = self._last.get((core.job_id, core.term), effect.version - 1)
        oracle.demand(effect.version == before + 1, f"{what} after step {before}")
        self._last[core.job_id, core.term] = effect.version

    def _issued(self, core: AllReduceJob, effects: list[Any]) -> None:
        watched: Any = SimpleNamespace(
            ranges=core, shape=self._shape(core), commits=None, history=None
        )
        for effect in effects:
            if isinstance(effect, Points):
                self._oracle._check_points(watched, effect.points)

    def _handed(self, replica: Replica, held: int, messages: Iterator[bytes]) -> Iterator[bytes]:
        kept = replica._kept
        if kept is not None and kept.version == held:
            self.caught_up += 1
        else:
            self.brought_up += 1
        yield from messages

    # -- looking

    def install(self, environment: Environment) -> None:
        """Look at everything that members do."""
        replace_, job = environment.replace, AllReduceJob
        settle, start, work, issue = job._settle, job._start, job.work, job._issue
        start_term, world = job._start_term, self._world

        def starting_term(core: AllReduceJob, message: Any) -> Any:
            before = core.replica.version if core.replica is not None else NONE
            effects = start_term(core, message)
            after = core.replica.version if core.replica is not None else NONE
            self._oracle.demand(after >= before, f"{self._what(core)} forgot version {before}")
            return effects

        def settling(core: AllReduceJob) -> Any:
            self._settles(core)
            return settle(core)

        def starting(core: AllReduceJob) -> Any:
            self._starts(core)
            return start(core)

        def working(core: AllReduceJob) -> Any:
            world.transitions += 1
            before = core.replica.version if core.replica is not None else NONE
            effects = work(core)
            self._worked(core, before, effects)
            return effects

        def issuing(core: AllReduceJob, go: Any) -> Any:
            effects = issue(core, go)
            self._issued(core, effects)
            return effects

        replace_(job, "_start_term", starting_term)
        replace_(job, "_settle", settling)
        replace_(job, "_start", starting)
        replace_(job, "work", working)
        replace_(job, "_issue", issuing)
        events = ("member_opened", "member_closed", "member_said", "owner_said")
        for name in events:
            replace_(job, name, self._acting(getattr(job, name)))
        self._install_parts(environment)

    def _install_parts(self, environment: Environment) -> None:
        next_served, look, hand_over = AllReduceJob.next_served, LateShards.look, Replica.hand_over
        world = self._world

        def serving(core: AllReduceJob, key: object) -> bytes | None:
            message = next_served(core, key)
            world.transitions += message is not None
            return message

        def looking(late: LateShards, now_s: float, held: int) -> Any:
            due = look(late, now_s, held)
            self.copied += len(due.orders)
            if due.orders:
                self._oracle.moments.met("copies_asked")
            return due

        def handing(replica: Replica, term: int, held: int) -> Iterator[bytes]:
            return self._handed(replica, held, hand_over(replica, term, held))

        environment.replace(AllReduceJob, "next_served", serving)
        environment.replace(LateShards, "look", looking)
        environment.replace(Replica, "hand_over", handing)

    def _acting(self, real: Any) -> Any:
        def acting(core: AllReduceJob, *args: Any) -> Any:
            self._world.transitions += 1
            effects = real(core, *args)
            self._check(core)
            return effects

        return acting
