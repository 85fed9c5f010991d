"""The secret of a private job: with control's journal and the aggregators, and nowhere else."""

from __future__ import annotations

from typing import Any

from coordinator.control.core.facts import Facts
from phalanx.privacy.secret import sampler_key
from phalanx.v1.control_journal_pb2 import JobSubmitted
from phalanx.v1.job_spec_pb2 import JobSpec

SECRET = bytes(range(100, 132))
KINDS = ("describe_job", "assign_job", "assign_ranges")


def private(spec: JobSpec) -> None:
    privacy = spec.train.privacy
    privacy.clip_norm, privacy.noise_multiplier, privacy.delta = 1.0, 1.1, 1e-5


def with_secret(submitted: JobSubmitted) -> None:
    submitted.secret = SECRET


def submit(cluster: Any) -> None:
    cluster.submit(edit=private, change=with_secret)


def assigned(cluster: Any, name: str = "a1") -> list[bytes]:
    return [each.secret for each in cluster.told(name, "assign_ranges")]


def test_aggregators_get_it_and_workers_get_the_key_of_the_rows_alone(cluster: Any) -> None:
    cluster.aggregator()
    for name in ("w1", "w2"):
        cluster.worker(name)
    submit(cluster)
    assert cluster.state() == "RUNNING"
    assert assigned(cluster) == [SECRET]
    plans = [
        message.plan
        for name in ("a1", "w1", "w2")
        for kind in KINDS
        for message in cluster.told(name, kind)
    ]
    assert len(plans) >= 4
    assert {plan.sampler_key for plan in plans} == {sampler_key(SECRET)}
    for name in ("w1", "w2"):
        for message in cluster.sent[cluster.sessions[name]]:
            assert SECRET not in message.SerializeToString()


def test_it_is_told_to_nobody_else_and_journalled_once(cluster: Any) -> None:
    cluster.aggregator()
    cluster.worker("w1")
    submit(cluster)
    cluster.report("job-1", 3)
    cluster.kill("w1")
    for text in (
        *(event.SerializeToString() for event in cluster.events),
        *(answer.SerializeToString() for answer in cluster.answers.values()),
        cluster.job().SerializeToString(),
    ):
        assert SECRET not in text
        assert sampler_key(SECRET) not in text
    records = [record.SerializeToString() for record in cluster.journal]
    kept = [record.WhichOneof("fact") for record in cluster.journal]
    assert [kind for kind, text in zip(kept, records, strict=True) if SECRET in text] == [
        "job_submitted"
    ]
    assert not any(sampler_key(SECRET) in text for text in records)


def test_it_is_the_same_in_each_term_and_under_each_leader(cluster: Any) -> None:
    cluster.aggregator()
    cluster.worker("w1")
    submit(cluster)
    cluster.kill("a1")
    cluster.aggregator("a2")
    cluster.advance(60.0)
    assert cluster.core.facts.jobs["job-1"].term == 2
    assert assigned(cluster, "a2") == [SECRET]
    # A leader that begins from a snapshot of the journal.
    snapshot = list(cluster.durable.snapshot())
    cluster.journal[:] = snapshot
    cluster.lead()
    cluster.aggregator("a3")
    cluster.worker("w1", incarnation="w1-2")
    cluster.advance(60.0)
    assert cluster.core.facts.jobs["job-1"].term == 3
    assert assigned(cluster, "a3") == [SECRET]


def test_a_snapshot_keeps_it(cluster: Any) -> None:
    cluster.aggregator()
    cluster.worker("w1")
    submit(cluster)
    replayed = Facts()
    for record in cluster.durable.snapshot():
        replayed.apply(record)
    assert replayed.jobs["job-1"].kept.submitted.secret == SECRET
