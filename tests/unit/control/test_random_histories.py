"""Random histories of the core: whatever happens in whatever order, the invariants hold.

Seeded chance drives the cluster of `conftest`; the invariants are checked after every event. At the
end the cluster is healed, and nothing may be stuck.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from coordinator.control.core import events as ev
from coordinator.control.core.facts import Facts
from phalanx.testing.members import held_jobs
from phalanx.v1 import coordination_service_pb2 as pb
from phalanx.v1 import storage_service_pb2 as storage_pb
from phalanx.v1.cluster_service_pb2 import Worker as WorkerView

WORKERS = ("w1", "w2", "w3", "w4", "w5")
AGGREGATORS = ("a1", "a2")
JOBS = ("job-1", "job-2")
BOTH = (False, True)
KINDS = (
    pb.LeafFailed.KIND_RAISED,
    pb.LeafFailed.KIND_HUNG,
    pb.LeafFailed.KIND_NON_FINITE,
    pb.LeafFailed.KIND_DATA,
)

RULES: dict[str, dict[str, Sequence[Any]]] = {}
"""What may happen, with the values that each argument is drawn from."""


def rule(**arguments: Sequence[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a method one of the things that may happen."""

    def add(method: Callable[..., None]) -> Callable[..., None]:
        RULES[method.__name__] = arguments
        return method

    return add


class History:
    """One history over the harness of `conftest`."""

    def __init__(self, cluster: Any) -> None:
        self.cluster = cluster
        self.incarnations: dict[str, int] = {}
        self.steps: dict[str, int] = {}
        self.terms: dict[tuple[str, int], int] = {}
        self.acknowledged: set[str] = set()
        self.tokens: dict[int, str] = {}

    def connected(self, name: str) -> bool:
        core = self.cluster.core
        member = core.workers.get(name) or core.aggregators.get(name)
        return member is not None and member.connected

    def job(self, job_id: str) -> Any:
        return self.cluster.core.facts.jobs.get(job_id)

    def root_of(self, job_id: str) -> str:
        facts = self.job(job_id)
        return facts.ranges[0].aggregator_id if facts is not None and facts.ranges else ""

    def runs(self, job_id: str) -> bool:
        facts = self.job(job_id)
        return facts is not None and facts.state == 2

    # -- members ----------------------------------------------------------------------

    @rule(
        name=WORKERS,
        slots=range(1, 5),
        odd=BOTH,
        fresh=BOTH,
        torch=("2.12.0", "2.13.0"),
        gpus=((), ("H100",), ("A100",)),
    )
    def worker_connects(
        self, name: str, slots: int, odd: bool, fresh: bool, torch: str, gpus: tuple[str, ...]
    ) -> None:
        held: tuple[pb.HeldWorkerJob, ...] = ()
        worker = self.cluster.core.workers.get(name)
        if fresh or worker is None:
            self.incarnations[name] = self.incarnations.get(name, 0) + 1
        else:
            held = held_jobs(self.cluster.sent.get(self.cluster.sessions.get(name, 0), []))
        number = self.incarnations.get(name, 1)
        self.cluster.worker(
            name,
            slots=slots,
            fingerprint="g" if odd else "f",
            incarnation=f"{name}-{number}",
            held_jobs=held,
            libraries={"torch": torch},
            gpus=4,
            gpu_kinds=gpus,
        )

    @rule(name=AGGREGATORS, keeps=BOTH)
    def aggregator_connects(self, name: str, keeps: bool) -> None:
        held = []
        if keeps and name in self.incarnations:
            for job_id in JOBS:
                facts = self.job(job_id)
                mine = [each.index for each in facts.ranges] if facts is not None else []
                if mine and self.root_of(job_id) == name:
                    held.append(pb.HeldRanges(job_id=job_id, term=facts.term, range_indexes=mine))
        else:
            self.incarnations[name] = self.incarnations.get(name, 0) + 1
        number = self.incarnations[name]
        self.cluster.aggregator(name, incarnation=f"{name}-{number}", held_ranges=held)

    @rule(name=WORKERS + AGGREGATORS)
    def member_dies(self, name: str) -> None:
        if self.connected(name):
            self.cluster.kill(name)

    @rule(name=WORKERS + AGGREGATORS, seconds=(0.3, 1.2, 2.5))
    def member_is_silent(self, name: str, seconds: float) -> None:
        end = self.cluster.time_s + seconds
        while self.cluster.time_s < end:
            self.cluster.time_s += 0.25
            others = [each.id for each in self.cluster.core.sessions.values()]
            for other in others:
                if other != name and self.connected(other):
                    self.cluster.heartbeats(other)
            self.cluster.feed(ev.Tick())

    @rule(seconds=(0.5, 3.0), alive=BOTH)
    def time_passes(self, seconds: float, alive: bool) -> None:
        self.cluster.advance(seconds, alive=alive)

    @rule(name=WORKERS)
    def worker_wants_to_leave(self, name: str) -> None:
        if self.connected(name) and name in self.cluster.core.workers:
            self.cluster.say(self.cluster.sessions[name], drain_requested=pb.DrainRequested())

    # -- jobs -------------------------------------------------------------------------

    @rule(job_id=JOBS, tolerant=BOTH, module=("", "cpu", "gpu"))
    def submit(self, job_id: str, tolerant: bool, module: str) -> None:
        def edit(spec: Any) -> None:
            if module:
                spec.train.model.torch.module = "net:build"
                spec.code.files["net.py"] = "pass"
                spec.resources.gpus = int(module == "gpu")
            if tolerant:
                spec.reproducibility.tolerant.SetInParent()
            else:
                spec.reproducibility.bitwise.fall_back_after.seconds = 5

        token = self.cluster.submit(job_id, f"submit-{job_id}-{tolerant}-{module}", edit)
        self.tokens[token] = job_id

    @rule(
        job_id=JOBS,
        kind=(ev.CancelJob, ev.PauseJob, ev.ResumeJob, ev.RetryJob, ev.DeleteJob),
    )
    def call(self, job_id: str, kind: Any) -> None:
        self.cluster.call(kind, job_id)

    @rule(job_id=JOBS, checkpoint=BOTH)
    def root_commits(self, job_id: str, checkpoint: bool) -> None:
        root = self.root_of(job_id)
        if not self.runs(job_id) or not self.connected(root):
            return
        step = self.steps[job_id] = self.steps.get(job_id, 0) + 3
        if checkpoint:
            manifest = storage_pb.CheckpointManifest(
                job_id=job_id, step=step, manifest_sha256=f"{step:064x}"
            )
            self.cluster.checkpoints.setdefault(job_id, []).insert(0, manifest)
        self.cluster.report(job_id, step, root, checkpoint_step=step if checkpoint else 0)

    @rule(job_id=JOBS, name=WORKERS, late_s=(0.2, 3.0), told=BOTH)
    def a_worker_is_late(self, job_id: str, name: str, late_s: float, told: bool) -> None:
        root = self.root_of(job_id)
        if not self.runs(job_id) or not self.connected(root):
            return
        term, step = self.job(job_id).term, self.steps.get(job_id, 0)
        if told:
            started = pb.CopiesStarted(
                job_id=job_id, term=term, step=step, worker_id=name, cause="late", shards=[1]
            )
            self.cluster.say(self.cluster.sessions[root], copies_started=started)
        late = [pb.LateWorker(worker_id=name, late_s=late_s)]
        self.cluster.report(job_id, step, root, late_workers=late)

    @rule(job_id=JOBS, outcome=(2, 3, 4))
    def root_ends(self, job_id: str, outcome: int) -> None:
        root = self.root_of(job_id)
        facts = self.job(job_id)
        if not self.runs(job_id) or not self.connected(root):
            return
        if outcome == 2 and not facts.kept.changed.pause_requested:
            return
        if outcome == 3 and self.cluster.terms.get(job_id) == facts.term:
            self.cluster.finals[job_id] = storage_pb.CheckpointManifest(
                job_id=job_id, step=99, final=True
            )
        self.cluster.report(job_id, self.steps.get(job_id, 0), root, outcome=outcome)

    @rule(job_id=JOBS, shard=range(16), kind=KINDS, name=WORKERS)
    def leaf_fails(self, job_id: str, shard: int, kind: Any, name: str) -> None:
        if self.connected(name) and self.runs(job_id) and name in self.cluster.core.workers:
            failed = pb.LeafFailed(
                job_id=job_id,
                term=self.job(job_id).term,
                step=self.steps.get(job_id, 0),
                shard=shard,
                kind=kind,
            )
            self.cluster.say(self.cluster.sessions[name], leaf_failed=failed)

    # -- storage and control ------------------------------------------------------------

    @rule()
    def storage_goes_away(self) -> None:
        self.cluster.storage_up = False

    @rule()
    def storage_comes_back(self) -> None:
        if self.cluster.storage_up:
            return
        self.cluster.storage_up = True
        self.cluster.perform()
        self.cluster.run_operations()

    @rule()
    def control_is_killed(self) -> None:
        self.storage_comes_back_silently()
        for name in self.incarnations:
            if name not in AGGREGATORS:
                self.incarnations[name] += 1
        self.cluster.lead()

    def storage_comes_back_silently(self) -> None:
        """A control process that starts needs storage; what was not durable is lost."""
        self.cluster.waiting.clear()
        self.cluster.operations.clear()
        self.cluster.storage_up = True

    # -- what must hold -----------------------------------------------------------------

    def check(self) -> None:
        self.acknowledged_jobs_are_durable()
        self.terms_never_go_back()
        self.nothing_is_answered_before_it_is_durable()

    def acknowledged_jobs_are_durable(self) -> None:
        for token, job_id in self.tokens.items():
            answer = self.cluster.answers.get(token)
            if answer is not None and not isinstance(answer, Exception):
                self.acknowledged.add(job_id)
        self.tokens = {k: v for k, v in self.tokens.items() if k not in self.cluster.answers}
        for job_id in self.acknowledged:
            gone = job_id in self.cluster.removed or self.job(job_id) is None
            assert gone or job_id in self.cluster.durable.jobs

    def terms_never_go_back(self) -> None:
        for job_id, facts in self.cluster.durable.jobs.items():
            key = (job_id, self.cluster.removed.count(job_id))
            assert facts.term >= self.terms.get(key, 0)
            self.terms[key] = facts.term

    def nothing_is_answered_before_it_is_durable(self) -> None:
        replayed = Facts()
        for record in self.cluster.journal:
            replayed.apply(record)
        assert replayed.digest() == self.cluster.durable.digest()

    def heal(self) -> None:
        """Heal everything: every job that is not paused must be able to end."""
        cluster = self.cluster
        if cluster.arriving:
            return  # an event has failed; that is the finding
        cluster.storage_up = True
        cluster.perform()
        cluster.run_operations()
        for name in AGGREGATORS:
            cluster.aggregator(name, incarnation=f"{name}-healed")
        for name in ("w1", "w2"):
            has: dict[str, Any] = {"libraries": {"torch": "2.13.0"}, "gpus": 4}
            cluster.worker(name, incarnation=f"{name}-healed", fingerprint="f", **has)
        cluster.advance(12.0)
        for job_id, facts in list(cluster.core.facts.jobs.items()):
            if facts.state != 2:
                assert facts.state != 1, f"{job_id} is stuck: {cluster.job(job_id).reason}"
                continue
            if cluster.core.jobs[job_id].stopped:
                continue
            held = set().union(
                *(
                    cluster.shards(worker.id, job_id)
                    for worker in cluster.core.workers.values()
                    if worker.connected and worker.state != WorkerView.STATE_DRAINING
                )
            )
            assert held == set(range(16)), f"{job_id}: {cluster.job(job_id).reason}"


def run(make_cluster: Any, *, histories: int, steps: int) -> None:
    """Run histories, the same ones every time; one that fails tells what has happened in it."""
    happened: Counter[str] = Counter()
    for number in range(histories):
        chance = random.Random(f"history {number} of {steps} steps")
        # Some histories lack most of what may happen, so that the rest comes in a row.
        likely = chance.choice((1.0, 1.0, 0.8, 0.5))
        rules = [name for name in RULES if chance.random() < likely]
        history = History(make_cluster())
        told: list[str] = []
        try:
            for _ in range(steps if rules else 0):
                name = chance.choice(rules)
                arguments = {key: chance.choice(values) for key, values in RULES[name].items()}
                told.append(f"{name}({arguments})")
                getattr(history, name)(**arguments)
                history.check()
                happened[name] += 1
            history.heal()
        except Exception as error:
            error.add_note("\n".join([f"history {number}:", *told]))
            raise
    assert happened.keys() == RULES.keys(), "something that may happen never did"


def test_random_histories_keep_the_invariants(make_cluster: Any) -> None:
    run(make_cluster, histories=60, steps=50)


@pytest.mark.slow
def test_many_long_histories(make_cluster: Any) -> None:
    run(make_cluster, histories=200, steps=120)
