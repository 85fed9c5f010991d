"""Real processes send traces to a real receiver, lose it, and train as if there were none."""

import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import phalanx
from phalanx.testing.arena import add_blobs, arena, gated_job, wait_until
from phalanx.testing.scraping import scrape, series
from phalanx.testing.trace_receiver import Received, receiver

pytestmark = pytest.mark.slow

STEPS = 12
CANARY = "canary-7f3a91"
ALL = {"OTEL_TRACES_SAMPLER": "always_on", "OTEL_BSP_SCHEDULE_DELAY": "50", "no_proxy": "127.0.0.1"}
SERVICES = {f"phalanx-{role}" for role in ("storage", "control", "aggregator", "worker")}

TRACELESS = '''
"""The gated model, in a process that must know nothing of traces."""

import sys
import threading

from gated import Gated

CANARY = "canary-7f3a91"


class Traceless(Gated):
    def loss_and_gradients(self, parameters, features, targets):
        assert not [name for name in sys.modules if name.startswith("opentelemetry")]
        assert "spans" not in [thread.name for thread in threading.enumerate()]
        return super().loss_and_gradients(parameters, features, targets)
'''


def traceless_job() -> dict[str, Any]:
    job = gated_job(STEPS, shards=4)
    job["code"]["files"]["traceless.py"] = TRACELESS
    job["train"]["model"]["custom"]["entrypoint"] = "traceless:Traceless"
    job["labels"] = {"owner": CANARY}
    return job


def plain_job() -> dict[str, Any]:
    return {
        "name": "plain",
        "data": {"name": "blobs", "shards": 4},
        "train": {"model": {"softmax_regression": {}}, "batch_size": 330, "stop": {"steps": STEPS}},
    }


@dataclass
class Story:
    received: Received
    job_id: str
    victim: str
    token: str
    sha256: str
    others: dict[str, str]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    """A cluster with keys that sends everything; one worker is killed in the middle of a leaf."""
    folder = tmp_path_factory.mktemp("traces")
    with receiver() as received:
        environment = {
            **ALL,
            "OTEL_EXPORTER_OTLP_ENDPOINT": received.endpoint,
            "OTEL_EXPORTER_OTLP_HEADERS": f"x-api-key={CANARY}",
        }
        with arena(folder, 2, secure=True, environment=environment) as ring:
            job = ring.submit(traceless_job())
            ring.caught_at(job, 3)
            victim = ring.caught_with_shards(job)
            ring.signal(victim)
            wait_until(lambda: ring.events("WORKER_LOST"), "the death to be seen")
            ring.gate.release()
            job.wait(timeout_s=90)
            sha256 = ring.cluster.submit(plain_job()).wait(timeout_s=90).parameters_sha256
            others = {
                kind: ring.cluster.submit(gated_job(5, shards=4, **{kind: {}}))
                for kind in ("all_reduce", "asynchronous")
            }
            for each in others.values():
                each.wait(timeout_s=90)
            keys = ring.cluster.state_dir / "keys"
            token = next(keys.glob("*.token")).read_text().strip()
        ids = {kind: each.id for kind, each in others.items()}
        yield Story(received, job.id, victim, token, sha256, ids)


def test_a_submission_is_one_trace_through_control_and_storage(story: Story) -> None:
    submissions = [
        span
        for span in story.received.named("phalanx.v1.JobService/SubmitJob")
        if span.service == "phalanx-control"
    ]
    assert len(submissions) == 4
    for submit in submissions:
        calls = story.received.children(submit)
        assert calls
        answers = [each for call in calls for each in story.received.children(call)]
        assert {call.service for call in calls} == {"phalanx-control"}
        assert {answer.service for answer in answers} == {"phalanx-storage"}
        assert "phalanx.v1.StorageService/SetPins" in {each.name for each in answers}
        assert {answer.attributes["rpc.grpc.status_code"] for answer in answers} == {0}


def test_a_step_is_one_trace_of_the_aggregator_and_the_workers(story: Story) -> None:
    assert {span.service for span in story.received.spans} == SERVICES
    steps = [
        span
        for span in story.received.named("phalanx.step")
        if span.attributes["phalanx.job_id"] == story.job_id
    ]
    assert {span.attributes["phalanx.step"] for span in steps} == {*range(1, STEPS + 1)}
    shards: dict[Any, set[Any]] = {}
    for step in steps:
        assert step.service == "phalanx-aggregator"
        below = story.received.children(step)
        collect, reduce = (
            next(each for each in below if each.name == f"phalanx.{name}")
            for name in ("collect", "reduce")
        )
        assert step.start_ns == collect.start_ns <= collect.end_ns == reduce.start_ns
        assert reduce.end_ns == step.end_ns
        for leaf in below:
            if leaf.name == "phalanx.leaf":
                assert leaf.service == "phalanx-worker"
                assert leaf.attributes["phalanx.step"] == step.attributes["phalanx.step"]
                first, count = leaf.attributes["phalanx.shard"], leaf.attributes["phalanx.shards"]
                seen = shards.setdefault(step.attributes["phalanx.step"], set())
                seen |= {*range(int(first), int(first) + int(count))}
    # Whatever a killed process had not sent is lost with it, which may be of the steps before.
    assert shards[STEPS] == {0, 1, 2, 3}


def test_jobs_of_other_kinds_tell_of_their_steps_too(story: Story) -> None:
    services, below = {}, {}
    for kind, job_id in story.others.items():
        steps = [
            span
            for span in story.received.named("phalanx.step")
            if span.attributes["phalanx.job_id"] == job_id
        ]
        services[kind] = {span.service for span in steps}
        below[kind] = {each.name for span in steps for each in story.received.children(span)}
    # Of an all-reduce job the workers own the parameters, and one of them commits.
    assert services == {
        "all_reduce": {"phalanx-worker"},
        "asynchronous": {"phalanx-aggregator"},
    }
    assert "phalanx.leaf" in below["all_reduce"]
    # Nobody knows the step of a leaf before it is committed, so it is a trace of its own.
    assert below["asynchronous"] - {"phalanx.checkpoint"} == {"phalanx.collect", "phalanx.reduce"}
    alone = [
        span
        for span in story.received.named("phalanx.leaf")
        if span.attributes["phalanx.job_id"] == story.others["asynchronous"]
    ]
    assert alone
    assert not any(span.parent_id for span in alone)


def test_the_death_of_a_worker_is_an_incident_with_its_phases(story: Story) -> None:
    found = [
        span
        for span in story.received.named("phalanx.incident")
        # A busy machine may have taken it for late before, which is another incident.
        if span.attributes["phalanx.member"] == story.victim
        and span.attributes["phalanx.cause"] == "worker_lost"
    ]
    assert len(found) == 1
    (incident,) = found
    assert incident.service == "phalanx-control"
    assert incident.attributes["phalanx.job_id"] == story.job_id
    phases = sorted(story.received.children(incident), key=lambda span: span.start_ns)
    names = [phase.name.removeprefix("phalanx.incident.") for phase in phases]
    assert names[0] in ("suspected", "fenced")
    assert names[-1] == "committed"
    assert phases[-1].end_ns == incident.end_ns


def test_secrets_and_names_of_data_are_in_no_span(story: Story) -> None:
    everything = b"".join(story.received.raw)
    assert {headers["x-api-key"] for headers in story.received.headers} == {CANARY}
    assert story.job_id.encode() in everything
    for secret in (CANARY, story.token, "blobs", "Bearer"):
        assert secret.encode() not in everything


def test_without_an_answer_of_the_receiver_a_job_ends_with_the_same_bits(
    story: Story, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        environment = {
            **ALL,
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{mute.getsockname()[1]}",
            "OTEL_BSP_MAX_QUEUE_SIZE": "16",
        }
        with phalanx.LocalCluster(workers=1, environment=environment) as cluster:
            add_blobs(cluster)
            traced = cluster.submit(plain_job()).wait(timeout_s=90)
            dropped = series("trace_spans_total", outcome="dropped")
            addresses = [
                member.metrics_address
                for member in cluster.processes()
                if member.role in ("control", "storage", "aggregator")
            ]
            wait_until(lambda: all(scrape(each)[dropped] for each in addresses), "dropped spans")
    with phalanx.LocalCluster(workers=0) as cluster:
        add_blobs(cluster)
        undisturbed = cluster.submit(plain_job()).wait(timeout_s=90)
    assert traced.parameters_sha256 == undisturbed.parameters_sha256 == story.sha256
