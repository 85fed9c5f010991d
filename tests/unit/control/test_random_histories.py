"""Random histories of the core: whatever happens in whatever order, the invariants hold.

Hypothesis drives the cluster of `conftest`; the invariants are checked after every event. At the
end the cluster is healed, and nothing may be stuck.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from coordinator.control.core import events as ev
from coordinator.control.core.facts import Facts
from phalanx.v1 import coordination_service_pb2 as pb
from phalanx.v1 import storage_service_pb2 as storage_pb
from phalanx.v1.cluster_service_pb2 import Worker as WorkerView

WORKERS = ("w1", "w2", "w3", "w4", "w5")
AGGREGATORS = ("a1", "a2")
JOBS = ("job-1", "job-2")
KINDS = (
    pb.LeafFailed.KIND_RAISED,
    pb.LeafFailed.KIND_HUNG,
    pb.LeafFailed.KIND_NON_FINITE,
    pb.LeafFailed.KIND_DATA,
)

workers = st.sampled_from(WORKERS)
aggregators = st.sampled_from(AGGREGATORS)
jobs = st.sampled_from(JOBS)


def machine_for(make_cluster: Any) -> type[RuleBasedStateMachine]:
    """Return the machine class over the harness of `conftest`."""

    class Histories(RuleBasedStateMachine):
        @initialize()
        def begin(self) -> None:
            self.cluster = make_cluster()
            self.incarnations: dict[str, int] = {}
            self.steps: dict[str, int] = {}
            self.terms: dict[tuple[str, int], int] = {}
            self.acknowledged: set[str] = set()
            self.tokens: dict[int, str] = {}

        # -- helpers ----------------------------------------------------------------------

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

        @rule(name=workers, slots=st.integers(1, 4), odd=st.booleans(), fresh=st.booleans())
        def worker_connects(self, name: str, slots: int, odd: bool, fresh: bool) -> None:
            held: list[pb.HeldWorkerJob] = []
            worker = self.cluster.core.workers.get(name)
            if fresh or worker is None:
                self.incarnations[name] = self.incarnations.get(name, 0) + 1
            else:
                held = self.holding(name)
            number = self.incarnations.get(name, 1)
            self.cluster.worker(
                name,
                slots=slots,
                fingerprint="g" if odd else "f",
                incarnation=f"{name}-{number}",
                held_jobs=held,
            )

        def holding(self, name: str) -> list[pb.HeldWorkerJob]:
            held: dict[str, pb.HeldWorkerJob] = {}
            for message in self.cluster.sent.get(self.cluster.sessions.get(name, 0), []):
                if message.WhichOneof("message") == "assign_job":
                    assign = message.assign_job
                    held[assign.plan.job_id] = pb.HeldWorkerJob(
                        job_id=assign.plan.job_id,
                        term=assign.term,
                        placement=assign.placement,
                        train_nodes=assign.train_nodes,
                        evaluation_nodes=assign.evaluation_nodes,
                        ready=True,
                    )
                elif message.WhichOneof("message") == "revoke_job":
                    held.pop(message.revoke_job.job_id, None)
            return list(held.values())

        @rule(name=aggregators, keeps=st.booleans())
        def aggregator_connects(self, name: str, keeps: bool) -> None:
            held = []
            if keeps and name in self.incarnations:
                for job_id in JOBS:
                    facts = self.job(job_id)
                    mine = [each.index for each in facts.ranges] if facts is not None else []
                    if mine and self.root_of(job_id) == name:
                        held.append(
                            pb.HeldRanges(job_id=job_id, term=facts.term, range_indexes=mine)
                        )
            else:
                self.incarnations[name] = self.incarnations.get(name, 0) + 1
            number = self.incarnations[name]
            self.cluster.aggregator(name, incarnation=f"{name}-{number}", held_ranges=held)

        @rule(name=st.one_of(workers, aggregators))
        def member_dies(self, name: str) -> None:
            if self.connected(name):
                self.cluster.kill(name)

        @rule(name=st.one_of(workers, aggregators), seconds=st.sampled_from((0.3, 1.2, 2.5)))
        def member_is_silent(self, name: str, seconds: float) -> None:
            end = self.cluster.time_s + seconds
            while self.cluster.time_s < end:
                self.cluster.time_s += 0.25
                others = [each.id for each in self.cluster.core.sessions.values()]
                for other in others:
                    if other != name and self.connected(other):
                        self.cluster.heartbeats(other)
                self.cluster.feed(ev.Tick())

        @rule(seconds=st.sampled_from((0.5, 3.0)), alive=st.booleans())
        def time_passes(self, seconds: float, alive: bool) -> None:
            self.cluster.advance(seconds, alive=alive)

        @rule(name=workers)
        def worker_wants_to_leave(self, name: str) -> None:
            if self.connected(name) and name in self.cluster.core.workers:
                self.cluster.say(self.cluster.sessions[name], drain_requested=pb.DrainRequested())

        # -- jobs -------------------------------------------------------------------------

        @rule(job_id=jobs, tolerant=st.booleans())
        def submit(self, job_id: str, tolerant: bool) -> None:
            def edit(spec: Any) -> None:
                if tolerant:
                    spec.reproducibility.tolerant.SetInParent()
                else:
                    spec.reproducibility.bitwise.fall_back_after.seconds = 5

            token = self.cluster.submit(job_id, f"submit-{job_id}-{tolerant}", edit)
            self.tokens[token] = job_id

        @rule(
            job_id=jobs,
            kind=st.sampled_from(
                (ev.CancelJob, ev.PauseJob, ev.ResumeJob, ev.RetryJob, ev.DeleteJob)
            ),
        )
        def call(self, job_id: str, kind: Any) -> None:
            self.cluster.call(kind, job_id)

        @rule(job_id=jobs, checkpoint=st.booleans())
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

        @rule(job_id=jobs, name=workers, late_s=st.sampled_from((0.2, 3.0)), told=st.booleans())
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

        @rule(job_id=jobs, outcome=st.sampled_from((2, 3, 4)))
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

        @rule(job_id=jobs, shard=st.integers(0, 15), kind=st.sampled_from(KINDS), name=workers)
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

        @precondition(lambda self: not self.cluster.storage_up)
        @rule()
        def storage_comes_back(self) -> None:
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

        @invariant()
        def acknowledged_jobs_are_durable(self) -> None:
            if not hasattr(self, "cluster"):
                return
            for token, job_id in self.tokens.items():
                answer = self.cluster.answers.get(token)
                if answer is not None and not isinstance(answer, Exception):
                    self.acknowledged.add(job_id)
            self.tokens = {k: v for k, v in self.tokens.items() if k not in self.cluster.answers}
            for job_id in self.acknowledged:
                gone = job_id in self.cluster.removed or self.job(job_id) is None
                assert gone or job_id in self.cluster.durable.jobs

        @invariant()
        def terms_never_go_back(self) -> None:
            if not hasattr(self, "cluster"):
                return
            for job_id, facts in self.cluster.durable.jobs.items():
                key = (job_id, self.cluster.removed.count(job_id))
                assert facts.term >= self.terms.get(key, 0)
                self.terms[key] = facts.term

        @invariant()
        def nothing_is_answered_before_it_is_durable(self) -> None:
            if not hasattr(self, "cluster"):
                return
            replayed = Facts()
            for record in self.cluster.journal:
                replayed.apply(record)
            assert replayed.digest() == self.cluster.durable.digest()

        def teardown(self) -> None:
            """Heal everything: every job that is not paused must be able to end."""
            if not hasattr(self, "cluster"):
                return
            cluster = self.cluster
            if cluster.arriving:
                return  # an event has failed; that is the finding
            cluster.storage_up = True
            cluster.perform()
            cluster.run_operations()
            for name in AGGREGATORS:
                cluster.aggregator(name, incarnation=f"{name}-healed")
            for name in ("w1", "w2"):
                cluster.worker(name, incarnation=f"{name}-healed", fingerprint="f")
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

    return Histories


def run(make_cluster: Any, *, histories: int, steps: int) -> None:
    """Run histories; the same ones every time, as printed when one fails (they are not shrunk)."""
    how = settings(
        max_examples=histories,
        stateful_step_count=steps,
        deadline=None,
        derandomize=True,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine_for(make_cluster), settings=how)


def test_random_histories_keep_the_invariants(make_cluster: Any) -> None:
    run(make_cluster, histories=60, steps=50)


@pytest.mark.slow
def test_many_long_histories(make_cluster: Any) -> None:
    run(make_cluster, histories=200, steps=120)
