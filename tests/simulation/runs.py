"""One seed, one run: draws a cluster, jobs and faults, runs them, heals, and judges."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import phalanx.needs
from phalanx.testing.simulation import Network, World
from phalanx.testing.simulation.clocks import Environment
from phalanx.testing.simulation.faults import Schedule
from phalanx.testing.simulation.loop import SimulationFailed
from phalanx.testing.simulation.network import Misdelivery
from tests.simulation import (
    best,
    jobs,
    last,
    programs,
    rare,
    reducing,
    references,
    task_sets,
    updating,
    verifying,
    versions,
    wishes,
)
from tests.simulation.cluster import STORAGE, Cluster, Services
from tests.simulation.draws import ALL_FROM_SEED, draw_parts, draw_shape
from tests.simulation.faults import Faults, fault_kinds
from tests.simulation.ledger import Ledger
from tests.simulation.neighbour import JOBS_MAX, Neighbour
from tests.simulation.newcomer import SLOTS_MAX, Newcomer
from tests.simulation.oracle import Oracle
from tests.simulation.outcome import Outcome
from tests.simulation.parts import ONE_BY_ONE, PARTS
from tests.simulation.races import Races
from tests.simulation.scripts import drawn, play
from tests.simulation.silence import Silence
from tests.simulation.stranger import Stranger
from tests.simulation.task_user import TaskUser
from tests.simulation.tasking import Tasking
from tests.simulation.time_lines import TimeLines
from tests.simulation.user import Job, User

FIRST_FAULT_S = 0.3

ONE_BY_ONE_SHARE = 0.3
"""Part of the seeds from there on that have a job whose contributions commit one by one."""

PRIVATE_SHARE = 0.05
"""Part of the others, whose jobs nothing else is asked of, in which these are private."""
NEIGHBOUR_SHARE = 0.03
"""Part of them in which a second user is there."""
NEWCOMER_SHARE = 0.02
"""Part of them in which a third one is."""

MISDELIVERED_SHARE = 0.12
"""Part of them in which calls lose their answers, and requests arrive late and again."""
MISDELIVERED = {"lost": "answer_lost", "late": "request_late", "twice": "request_repeated"}

KINDS = frozenset(fault_kinds()) | {"job_paused", "job_cancelled", "call_repeated", "last_strike"}
KINDS |= frozenset(MISDELIVERED.values())
"""Every kind of fault that a batch must have met."""


@dataclass(frozen=True)
class Settings:
    """What a seed draws besides its faults."""

    controls: int
    aggregators: int
    workers: int
    slots: int
    leaf_s: float
    leaf_timeout_s: float
    range_min_bytes: int
    snapshot_every_records: int
    faults_s: float
    every_s: float
    mixed: bool
    """Whether one worker computes other bits."""
    shapes: tuple[jobs.Shape, ...]
    terms_max: int = 0
    """Terms that a job may need under the faults of a scenario; 0: any number."""
    strike: str = ""
    """A strike in the act that comes again and again, see `Faults.strike_at`."""
    script: str = ""
    """What is done to the cluster besides what is drawn, see `scripts`."""
    script_s: float = 1.5
    """When it begins."""
    parts: str = ""
    """What all jobs are composed of, one of `parts.ALL_PARTS`; empty: as drawn."""
    liars: int = 0
    """Workers that lie in jobs that outvote them, see `hosts.Machines.liars`."""
    unequal: bool = False
    """Whether they lie about the same leaves, and no two of them say the same."""
    from_the_first: bool = False
    """Whether they lie before a job begins as well: about the leaf that it is described with."""
    converges_s: float = 60.0
    """Virtual time after the last fault within which every job must have ended."""
    share: float = 0.6
    """How likely each kind of fault is there."""
    lasting: bool = True
    """Whether a run of the swarm may draw a script, see `scripts.drawn`."""
    neighbour: bool = False
    """Whether a second user is there, see `neighbour`."""
    namespace_jobs_max: int = 10_000
    namespace_slots_max: int = 0
    running_jobs_max: int = 64
    wishes: tuple[wishes.Wish, ...] = ()
    """What each job asks for besides; none: nothing."""
    odd: bool = False
    """Whether the first worker's own leaves have other bits."""
    old: bool = False
    """Whether the last worker has an older version of what all jobs need, see `versions`."""
    newcomer: bool = False
    """Whether a third user is there, see `newcomer`."""
    last: str = ""
    """The last fault, see `last.LastStrike`."""
    last_s: float = 1.5
    """From when on it may come."""
    small: int = 0
    """Aggregators that have not the memory for any range."""
    loses_nobody: bool = False
    """Whether no member may be taken for lost since it is not heard of; in scenes."""
    fails: str = ""
    """Why every job must fail, in scenes; empty: none may."""
    stranger: bool = False
    """Whether somebody speaks to the services who is none of theirs, see `stranger`."""
    namespace_bytes: int = 0
    """Data sets and models that storage takes of a namespace; 0: any number."""
    garbage_s: float = 3600.0
    """Time between two collections of garbage; by itself no run lasts so long."""
    limits: tuple[tuple[str, Any], ...] = ()
    """Values of "module:NAME" in this run: limits that are too large to be met in a minute."""
    at_once: bool = False
    """Whether the user waits with no job."""
    changes: tuple[tuple[float, str, int], ...] = ()
    """When, in scenes, the user pauses or cancels which of her jobs."""
    lists: bool = False
    """Whether the user asks every control process for its jobs each time that she looks."""
    misdelivered: str = ""
    """A method whose requests, in scenes, mostly arrive late or twice, or lose their answers."""
    tasks: int = 0
    """How many sets of tasks there are, see `task_sets`."""
    programs: int = 0
    """How many programs there are, see `programs`."""


def draw(seed: int) -> Settings:
    """Draw a cluster and its jobs."""
    chance = random.Random(f"settings {seed}")
    job_count = chance.choice([1, 1, 2])
    parts = random.Random(f"parts {seed}")
    workers = chance.choice([1, 2, 2, 3, 4])
    return Settings(
        controls=chance.choice([1, 2, 2, 3]),
        aggregators=chance.choice([1, 2, 2, 3]),
        workers=workers,
        slots=chance.choice([1, 1, 2]),
        leaf_s=chance.choice([0.02, 0.03, 0.05]),
        leaf_timeout_s=2.0,
        range_min_bytes=chance.choice([64, 128, 1 << 20]),
        snapshot_every_records=chance.choice([10, 30, 2000]),
        faults_s=chance.uniform(5.0, 9.0),
        every_s=chance.choice([0.5, 0.8, 1.2]),
        mixed=chance.random() < 0.2 and workers > 1,
        shapes=draw_one_by_one(
            tuple(
                jobs.composed(draw_shape(chance), draw_parts(parts, seed)) for _ in range(job_count)
            ),
            seed,
        ),
    )


def draw_one_by_one(shapes: tuple[jobs.Shape, ...], seed: int) -> tuple[jobs.Shape, ...]:
    """Draw whether the contributions of the first job commit one by one."""
    chance = random.Random(f"one by one {seed}")
    if seed < ALL_FROM_SEED or chance.random() >= ONE_BY_ONE_SHARE:
        return shapes
    first = jobs.composed(shapes[0], chance.choice(sorted(ONE_BY_ONE)))
    return (first, *shapes[1:])


def draw_private(settings: Settings, chance: random.Random) -> Settings:
    """In a part of those whose jobs are plain otherwise these are private."""
    shapes = settings.shapes
    plain = not settings.parts and not settings.wishes and not any(each.bad for each in shapes)
    plain = plain and all(each.parts in PARTS and not each.tolerant for each in shapes)
    if not plain or chance.random() >= PRIVATE_SHARE:
        return settings
    return replace(settings, shapes=tuple(jobs.composed(each, "private") for each in shapes))


class Run:
    """One run, step by step; `simulate` does them all."""

    def __init__(
        self, given: Services, settings: Settings, seed: int, log: Callable[[str], None] | None
    ) -> None:
        self.settings = settings
        self.world = World(seed)
        self.world.log = log
        self.network = Network(self.world)
        self.cluster = Cluster(self.world, self.network, given, settings)
        self.oracle = Oracle(self.world)
        self.ledger = Ledger(self.oracle)
        self.ledger.liars = self.cluster.machines.liars
        self.ledger.false_leaves = self.cluster.machines.false_leaves
        self.ledger.running_jobs_max = settings.running_jobs_max
        self.races = Races(self.oracle.moments)
        self.members = reducing.Members(self.oracle)
        self.silence = Silence(self.oracle, loses_nobody=settings.loses_nobody)
        self.time_lines = TimeLines(self.oracle)
        self.faults = Faults(self.cluster, self.oracle.moments)
        self.last = last.LastStrike(
            self.cluster, self.faults, settings.last, random.Random(f"last strike {seed}")
        )
        chance = random.Random(f"submissions {seed}")
        self.user = User(
            self.cluster.control_addresses,
            STORAGE,
            list(settings.shapes),
            random.Random(f"calls {seed}"),
            settings.wishes,
        )
        self.user.waits_s = [
            chance.choice([0.0, 0.0, chance.uniform(0.0, 4.0)]) for _ in settings.shapes
        ]
        if settings.at_once:
            self.user.waits_s = [0.0 for _ in settings.shapes]
        for change in settings.changes:
            self.user.will(*change)
        self.user.looks_at_lists = settings.lists
        self.neighbour = Neighbour(
            self.cluster, random.Random(f"neighbour {seed}"), self.oracle.fingerprints
        )
        self.newcomer = Newcomer(
            self.cluster, random.Random(f"newcomer {seed}"), self.oracle.fingerprints
        )
        self.stranger = Stranger(
            self.cluster, random.Random(f"stranger {seed}"), self.oracle.fingerprints
        )
        self.tasking = Tasking(self.oracle, self.ledger.facts, self.cluster.machines.calls)
        has_tasks = settings.tasks or settings.programs
        self.task_user = self._make_task_user(seed) if has_tasks else None
        self._watched = Environment()

    def _make_task_user(self, seed: int) -> TaskUser:
        chance, cluster = random.Random(f"task sets {seed}"), self.cluster
        calls = cluster.machines.calls
        lasts = bool(self.settings.script) or len(cluster.workers) == 1
        if chance.random() < task_sets.UNLOADABLE_SHARE and not lasts:
            calls.unloadable.add(cluster.workers[-1])
        sets: list[task_sets.AnySet] = [
            task_sets.draw_set(chance) for _ in range(self.settings.tasks)
        ]
        sets += [programs.draw_program(chance) for _ in range(self.settings.programs)]
        user = TaskUser(cluster.control_addresses, STORAGE, sets, chance, calls, self.tasking.sets)
        user.waits_s = [chance.choice([0.0, 0.0, chance.uniform(0.0, 3.0)]) for _ in sets]
        for index in range(len(sets)):
            drawn = chance.random()
            if drawn < 0.4:
                act = "pause" if drawn < 0.3 else "cancel"
                user.will(chance.uniform(0.5, 6.0), act, index)
        return user

    def start(self) -> None:
        """Start the cluster and its user."""
        self.oracle.install(self._watched)
        self.ledger.install(self._watched)
        self.races.install(self._watched)
        self.members.install(self._watched)
        self.silence.install(self._watched)
        self.time_lines.install(self._watched)
        for where, value in self.settings.limits:
            module, _, name = where.partition(":")
            self._watched.replace(import_module(module), name, value)
        if self.settings.old:
            self._watched.replace(phalanx.needs, "_BY_KIND", versions.NEEDED)
        if self.task_user is not None:
            self.tasking.install(self._watched)
        self.cluster.start_all()
        self.world.start("user-1", self.user.run)
        if self.settings.neighbour:
            self.world.start("user-2", self.neighbour.run)
        if self.settings.newcomer:
            self.world.start("user-3", self.newcomer.run)
        if self.settings.stranger:
            self.stranger.install(self._watched)
            self.world.start("user-4", self.stranger.run)
        if self.task_user is not None:
            self.world.start("user-5", self.task_user.run)

    def heal(self, schedule: Schedule) -> None:
        """The time of faults is over, if it is not already."""
        if not self.cluster.healed:
            self.cluster.healed = True
            schedule.heal()
            self.cluster.heal()

    def converge(self) -> None:
        """Run until every job has ended, as they must."""
        world = self.world
        users = [self.user] if self.task_user is None else [self.user, self.task_user]

        def ended() -> bool:
            return all(user.ended for user in users)

        def one_ended() -> None:
            if ended():
                world.stop()

        one_ended()
        for user in users:
            user.on_end = one_ended
        converges_s, begun_s = self.settings.converges_s, world.now_s
        sets = self.settings.tasks + self.settings.programs
        converges_s += sets * task_sets.CONVERGES_S
        world.run(begun_s + converges_s)
        if self.last.struck_s > begun_s and not ended():
            world.run(self.last.struck_s + converges_s)
        if world.failure is None and not ended():
            states = {
                job_id: f"{Job.State.Name(job.state)} {job.reason} {job.message}"
                for user in users
                for job_id, job in user.last.items()
            }
            world.fail(
                SimulationFailed(
                    f"not ended {converges_s:g} s after everything was healed: {states}"
                )
            )

    def run(self, schedule: Schedule) -> None:
        """Let faults happen, heal, and go on until everything has ended."""
        try:
            self.world.run(self.settings.faults_s)
            self.heal(schedule)
            self.converge()
        except SimulationFailed as error:
            # Seen in a callback of the world, which nothing else catches.
            self.world.fail(error)

    def judge(self, schedule: Schedule | None = None) -> Outcome:
        """Compare what came out with what had to, and end everything."""
        world, user = self.world, self.user
        outcome = Outcome(world.seed, jobs=len(user.ids))
        if world.failure is None:
            for job_id, shape in zip(user.ids, self.settings.shapes, strict=True):
                self._judge_job(outcome, job_id, shape)
        outcome.failure = str(world.failure or "")
        outcome.transitions = world.transitions
        outcome.steps = sum(self.oracle.commits.values())
        outcome.virtual_s = world.now_s
        outcome.lost, outcome.doubled = self.oracle.lost, self.oracle.doubled
        outcome.started, outcome.repeated = self.oracle.starts, self.oracle.repeated
        outcome.errands, outcome.bad_jobs = self.neighbour.errands, Counter(self.neighbour.ends)
        outcome.orphaned = self.cluster.machines.orphaned
        outcome.strange = self.stranger.errands
        outcome.worse_jobs, outcome.refused = Counter(self.newcomer.ends), self.newcomer.refused
        histories = self.oracle.commit_histories.values()
        outcome.at_bound = sum(history.at_bound for history in histories)
        outcome.stale_accepted = self.oracle.stale_accepted
        outcome.stale_refused = self.oracle.stale_refused
        outcome.fenced_off, outcome.outlived = self.oracle.fenced_off, len(self.oracle.outlived)
        outcome.updated = self.oracle.updated
        outcome.cut_between = self.oracle.between.rolled_back
        outcome.terms = max(self.oracle.terms.values(), default=0)
        if 0 < self.settings.terms_max < outcome.terms and world.failure is None:
            world.fail(SimulationFailed(f"a job was rolled back: it is in term {outcome.terms}"))
            outcome.failure = str(world.failure)
        outcome.trace = world.trace_hash
        if schedule is not None:
            outcome.faults.update({**schedule.fired, **self.faults.met})
            outcome.faults["struck_in_the_act"] = self.faults.struck
            outcome.faults["last_strike"] = int(self.last.struck)
            met = self.network.misdelivered
            outcome.faults.update({MISDELIVERED[kind]: count for kind, count in met.items()})
        outcome.reasons, outcome.incomplete = user.reasons, user.incomplete
        outcome.again = self.network.misdelivered["late"] + self.network.misdelivered["twice"]
        disk = self.cluster.storage_machine.disk
        outcome.torn, outcome.unsynced = disk.torn, disk.lost
        outcome.rolled_back = sum(self.oracle.terms.values()) - len(self.oracle.terms)
        outcome.sent_away = self.ledger.sent_away
        outcome.deaf, outcome.silent = self.silence.deaf, self.silence.lost
        outcome.lies = self.cluster.machines.lies
        outcome.quarantines = self.ledger.quarantines
        outcome.of_one_version = self.ledger.of_one_version
        outcome.copies_asked, outcome.copies_raced = self.races.asked, self.races.raced
        members = self.members
        outcome.copies_asked += members.copied
        outcome.reduced, outcome.caught_up = members.committed, members.caught_up
        outcome.brought_up, outcome.begun_for = members.brought_up, members.begun_for
        self._add_tasks(outcome)
        if user.repeats:
            outcome.faults["call_repeated"] += user.repeats
        if user.pauses:
            outcome.faults["job_paused"] += user.pauses
        if user.cancelled:
            outcome.faults["job_cancelled"] += len(user.cancelled)
        outcome.faults = +outcome.faults
        return outcome

    def _add_tasks(self, outcome: Outcome) -> None:
        user, tasking = self.task_user, self.tasking
        if user is None:
            return
        outcome.tasks, outcome.tasks_given_up = user.results, user.given_up
        calls = self.cluster.machines.calls
        outcome.calls, outcome.went_on = calls.begun, calls.went_on
        outcome.tasks_copied, outcome.tasks_taken_over = tasking.copied, tasking.taken_over
        outcome.passed_over = user.passed
        outcome.results_read, outcome.results_gone = tasking.read, tasking.gone
        outcome.reasons += user.reasons
        outcome.faults["job_paused"] += user.pauses
        outcome.faults["job_cancelled"] += len(user.cancelled)

    def _judge_job(self, outcome: Outcome, job_id: str, shape: jobs.Shape) -> None:
        job = self.user.last[job_id]
        if self.settings.fails:
            if (job.state, job.reason) != (Job.STATE_FAILED, self.settings.fails):
                told = f"{Job.State.Name(job.state)}: {job.reason}: {job.message}"
                fails = self.settings.fails
                self.world.fail(SimulationFailed(f"{job_id} ended as {told}, not by {fails}"))
        elif job.state == Job.STATE_SUCCEEDED:
            shape = replace(shape, fingerprint=self.oracle.fingerprints[job_id])
            left_out, wrong = jobs.examples_skipped(shape), ""
            kept = best.best_step(shape, shape.ends_at) or 0
            outcome.kept += 0 < kept < shape.ends_at
            if shape.one_by_one:
                wrong, sha256 = self.oracle.commit_histories[job_id].end()
            elif shape.backup:
                sha256, left_out = self.oracle.histories[job_id].end()
            else:
                sha256 = references.reference_sha256(shape, best.model_step(shape, shape.ends_at))
            free = job_id in self.oracle.free
            outcome.left_out += left_out
            right = free or job.result.parameters_sha256 == sha256
            outcome.sha_equal += right
            bits = not shape.tolerant and not free
            reason = "STOP_PLATEAU" if shape.plateau else "STOP_STEPS"
            promised = (bits, shape.ends_at, left_out, 0, shape.ends_at, reason, kept)
            result = job.result
            if wrong:
                self.world.fail(SimulationFailed(f"the history of {job_id} {wrong}"))
            elif not right:
                self.world.fail(SimulationFailed(f"{job_id} ended with other bits"))
            elif promised != (
                result.bit_identical,
                result.steps,
                result.examples_lost,
                result.examples_doubled,
                job.progress.step,
                job.reason,
                result.best.step,
            ):
                told = f"{result} {job.progress} {job.reason}, and should say {promised}"
                self.world.fail(SimulationFailed(f"{job_id} ended with another result: {told}"))
        elif job.state == Job.STATE_CANCELLED and job_id in self.user.cancels:
            outcome.cancelled += 1
            if job_id in self.oracle.final:
                self.world.fail(SimulationFailed(f"{job_id} was cancelled and has been finished"))
        else:
            told = f"{Job.State.Name(job.state)}: {job.reason}: {job.message}"
            self.world.fail(SimulationFailed(f"{job_id} ended as {told}"))
        if job_id in self.user.cancelled and job.state != Job.STATE_CANCELLED:
            self.world.fail(SimulationFailed(f"{job_id} was cancelled, and ended otherwise"))

    def close(self) -> None:
        """End all processes and look no more."""
        self.world.close()
        self._watched.close()


def simulate(
    given: Services,
    seed: int,
    log: Callable[[str], None] | None = None,
    only: frozenset[str] | None = None,
    **changed: Any,
) -> Outcome:
    """Run one seed from beginning to end: with all its faults, or `only` with some kinds of them.

    `changed` are settings that differ from what the seed draws.
    """
    clock_s = time.process_time()
    if only is None and not changed and seed >= ALL_FROM_SEED:
        scenario = rare.drawn(random.Random(f"rare {seed}"))
        if scenario is not None:
            only, changed = frozenset(scenario[0]), {"mixed": False, **dict(scenario[1])}
    settings = replace(draw(seed), **changed)
    if settings.parts:
        shapes = tuple(jobs.composed(shape, settings.parts) for shape in settings.shapes)
        settings = replace(settings, shapes=shapes)
    if only is None and seed >= ALL_FROM_SEED:
        settings = verifying.drawn(settings, seed)
        settings = wishes.drawn(settings, random.Random(f"wishes {seed}"), draw_shape)
        settings = reducing.drawn(settings, random.Random(f"all-reduce {seed}"))
        settings = draw_private(settings, random.Random(f"private jobs {seed}"))
        settings = updating.drawn(settings, random.Random(f"updating {seed}"), jobs.composed)
    if any(shape.tolerant for shape in settings.shapes):
        # Such a job takes everybody, whatever bits they compute.
        settings = replace(settings, mixed=False)
    if only is None:
        settings = drawn(settings, random.Random(f"script {seed}"))
        if seed >= ALL_FROM_SEED and random.Random(f"neighbours {seed}").random() < NEIGHBOUR_SHARE:
            settings = replace(settings, neighbour=True)
        if seed >= ALL_FROM_SEED and random.Random(f"newcomers {seed}").random() < NEWCOMER_SHARE:
            settings = replace(settings, newcomer=True)
        if seed >= ALL_FROM_SEED:
            settings = last.drawn(settings, random.Random(f"last {seed}"))
            settings = task_sets.drawn(settings, random.Random(f"sets of tasks {seed}"))
            settings = programs.drawn(settings, random.Random(f"graphs of tasks {seed}"))
            settings = best.drawn(settings, random.Random(f"keep best {seed}"))
    if settings.neighbour:
        settings = replace(settings, namespace_jobs_max=JOBS_MAX)
    if settings.newcomer:
        settings = replace(settings, namespace_slots_max=SLOTS_MAX)
    run = Run(given, settings, seed, log)
    try:
        run.start()
        kinds = run.faults.kinds()
        if only is None:
            schedule = Schedule(run.world, kinds, every_s=settings.every_s, share=settings.share)
            _user_changes_her_mind(run, random.Random(f"user {seed}"))
            run.faults.lie_in_wait(random.Random(f"strikes {seed}"))
            if seed >= ALL_FROM_SEED:
                run.faults.lie_in_wait_for_a_write(random.Random(f"torn {seed}"))
                run.network.misdelivery = _misdelivery(random.Random(f"misdelivery {seed}"))
        else:
            chosen = {kind: kinds[kind] for kind in sorted(only)}
            schedule = Schedule(run.world, chosen, every_s=settings.every_s, share=1.0)
            if settings.misdelivered:
                chance = random.Random(f"misdelivery {seed}")
                run.network.misdelivery = Misdelivery(chance, 0.8, method=settings.misdelivered)
        schedule.begin(FIRST_FAULT_S, settings.faults_s)
        run.faults.strike_at(settings.strike, random.Random(f"strike {seed}"))
        play(run.cluster, settings.script, run.oracle, settings.script_s)
        run.last.lie_in_wait(settings.last_s, lambda: run.heal(schedule))
        run.run(schedule)
        outcome = run.judge(schedule)
    finally:
        run.close()
        given.collect_garbage()
    outcome.cpu_s = time.process_time() - clock_s
    return outcome


def _misdelivery(chance: random.Random) -> Misdelivery | None:
    if chance.random() >= MISDELIVERED_SHARE:
        return None
    return Misdelivery(chance, chance.choice([0.03, 0.1, 0.3]))


def _user_changes_her_mind(run: Run, chance: random.Random) -> None:
    for index in range(len(run.settings.shapes)):
        drawn = chance.random()
        if drawn < 0.15:
            run.user.will(chance.uniform(0.5, 6.0), "pause", index)
        elif drawn < 0.2:
            run.user.will(chance.uniform(0.5, 6.0), "cancel", index)
