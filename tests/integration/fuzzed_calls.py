"""A real cluster that is sent requests drawn from the descriptors, and what must come of it."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any, Self

import grpc
import grpc.aio
import psutil
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message

import phalanx.v1
from phalanx.errors import Code
from phalanx.rpc.status import from_rpc_error
from phalanx.sdk.job_files import as_document
from phalanx.testing.arena import Arena
from phalanx.testing.hostile_messages import HostileMessages, methods_of
from phalanx.v1 import aggregation_service_pb2 as exchange
from phalanx.v1 import coordination_service_pb2 as coordination
from phalanx.v1 import (
    dataset_service_pb2,
    job_service_pb2,
    model_service_pb2,
    task_service_pb2,
    training_pb2,
)
from phalanx.v1 import storage_service_pb2 as storage

GUARD_S = 30.0
"""An answer that takes longer does not come."""
FOLLOWED_S = 1.0
"""So long news are waited for; the end of a stream that follows something is not."""
ANSWERS_READ = 20
AT_ONCE = 12
REFUSALS = frozenset({each.value for each in Code} - {Code.INTERNAL.value})
"""What a caller may hear; UNKNOWN and INTERNAL are defects."""
TRACES = ("Traceback", "unexpected_error", "internal_error", "never retrieved", "member_message_")
"""Words in a log that tell of an exception that nobody expected."""

TASKS = {
    "name": "held-tasks",
    "code": {"files": {"work.py": "import time\ndef run(n):\n    time.sleep(3600)\n"}},
    "tasks": {"entrypoint": "work:run", "arguments": [{"n": 1}, {"n": 2}]},
}


def all_methods() -> list[MethodDescriptor]:
    """Every method of every service of the package."""
    folder = Path(phalanx.v1.__file__).parent
    stubs = sorted(folder.glob("*_service_pb2.py"))
    return methods_of(*(f"phalanx/v1/{each.stem.removesuffix('_pb2')}.proto" for each in stubs))


def path_of(method: MethodDescriptor) -> str:
    """The name of a method on the wire."""
    return f"/{method.containing_service.full_name}/{method.name}"


class Fuzzing:
    """Sends drawn requests to the members of a cluster that serve them, and counts the answers."""

    def __init__(self, ring: Arena, seed: int, jobs: Sequence[str]) -> None:
        self.ring = ring
        self.chance = Random(seed)
        self.answers: dict[str, Counter[str]] = defaultdict(Counter)
        self.wrong: list[str] = []
        self.messages = HostileMessages(self.chance)
        self.servers: dict[str, list[str]] = {}
        self.knows(jobs)

    def knows(self, jobs: Sequence[str]) -> None:
        """Name these jobs from now on, and call the members that are there now."""
        digest = self.ring.cluster.data.get("blobs").manifest_digest
        self.messages = HostileMessages(
            self.chance,
            # Neither the lease nor the journal of control, nor its members: whoever may write
            # those is a part of the cluster.
            [*jobs, "blobs", "default", "notes", "worker-77", "a", "default/blobs@1", digest],
            samples(jobs, digest),
        )
        self.servers = self._servers()

    def _servers(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for member in self.ring.cluster.processes():
            for service in SERVED[member.role]:
                found.setdefault(f"phalanx.v1.{service}", []).append(member.address)
        return found

    async def run(self, requests: int) -> None:
        """Call every method so often."""
        async with _Channels() as channels:
            calls = [
                self._call(channels.of(address), method)
                for method in all_methods()
                for address in self.servers[method.containing_service.full_name]
                for _ in range(requests)
            ]
            self.chance.shuffle(calls)
            waiting = iter(calls)
            async with asyncio.TaskGroup() as group:
                for _ in range(AT_ONCE):
                    group.create_task(self._one_by_one(waiting))

    async def _one_by_one(self, calls: Iterator[Any]) -> None:
        for call in calls:
            await call

    async def _call(self, channel: grpc.aio.Channel, method: MethodDescriptor) -> None:
        requests = [self.messages.request(method.input_type)]
        if method.client_streaming:
            requests = self._stream(method)
        try:
            await _made(channel, method, requests)
            answer = "OK"
        except grpc.aio.AioRpcError as error:
            # As our own clients understand it: a stream may have ended while it was written to.
            told = from_rpc_error(error)
            answer = told.code.value if error.code().name != "UNKNOWN" else "UNKNOWN"
            followed = method.server_streaming and answer == "DEADLINE_EXCEEDED"
            if not followed and (answer not in REFUSALS or not told.message):
                self.wrong.append(
                    f"{path_of(method)}: {answer} {error.details()!r} {[r[:300] for r in requests]}"
                )
        self.answers[path_of(method)][answer] += 1

    def _stream(self, method: MethodDescriptor) -> list[bytes]:
        """What is sent on a stream: mostly it begins as it should."""
        count = self.chance.choice((0, 1, 2, 4, 8))
        drawn = [self.messages.request(method.input_type) for _ in range(count)]
        opening = OPENINGS.get(method.input_type.full_name)
        if opening and self.chance.random() < 0.8:
            samples = self.messages.samples[method.input_type.full_name]
            drawn.insert(0, self.chance.choice(samples[:opening]).SerializeToString())
        return drawn


class _Channels:
    def __init__(self) -> None:
        self._open: dict[str, grpc.aio.Channel] = {}

    def of(self, address: str) -> grpc.aio.Channel:
        if address not in self._open:
            self._open[address] = grpc.aio.insecure_channel(address)
        return self._open[address]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for channel in self._open.values():
            await channel.close()


async def _made(channel: grpc.aio.Channel, method: MethodDescriptor, requests: list[bytes]) -> None:
    """Make a call of whatever shape, and read what comes."""
    path = path_of(method)
    if not method.client_streaming and not method.server_streaming:
        await channel.unary_unary(path)(requests[0], timeout=GUARD_S)
    elif not method.server_streaming:
        await channel.stream_unary(path)(iter(requests), timeout=GUARD_S)
    else:
        if method.client_streaming:
            call = channel.stream_stream(path)(iter(requests), timeout=FOLLOWED_S)
        else:
            call = channel.unary_stream(path)(requests[0], timeout=FOLLOWED_S)
        for _ in range(ANSWERS_READ):
            if await call.read() is grpc.aio.EOF:
                return
        call.cancel()


SERVED = {
    "storage": ("StorageService", "DatasetService", "ModelService"),
    "control": ("JobService", "ClusterService", "CoordinationService"),
    "aggregator": ("AggregationService", "TaskService"),
    "worker": ("AggregationService",),
}
"""What each kind of process serves."""

OPENINGS = {
    "phalanx.v1.ExchangeRequest": 3,
    "phalanx.v1.SessionRequest": 2,
    "phalanx.v1.WorkRequest": 3,
}
"""Streams that begin with a hello: so many of the first samples are some."""


def samples(jobs: Sequence[str], digest: str) -> dict[str, list[Message]]:
    """Requests that the servers take, or would in another moment."""
    made: list[Message] = [
        *_streams(jobs, digest),
        *_specs(),
        dataset_service_pb2.CreateDatasetRequest(name="more", manifest_digest=digest),
        dataset_service_pb2.GetDatasetRequest(name="blobs"),
        model_service_pb2.GetModelRequest(name="chaos"),
        storage.PutBlobRequest(chunk=b"content"),
        storage.GetBlobRequest(digest=digest),
        storage.CheckBlobsRequest(digests=[digest, "0" * 64]),
        storage.ComposeBlobRequest(
            pieces=[
                storage.BlobPiece(inline=b"head"),
                storage.BlobPiece(slice=storage.BlobSlice(digest=digest, offset=1, length=4)),
            ]
        ),
        storage.AppendJournalRequest(stream="notes", records=[b"a", b"b"]),
        storage.AppendJournalsRequest(
            append=storage.AppendJournalRequest(stream="notes", records=[b"c"])
        ),
        storage.ReadJournalRequest(stream="notes"),
        storage.CommitCheckpointRequest(
            job_id="a-22222222",
            term=1,
            step=1,
            range_count=1,
            keep=3,
            root_state="{}",
            spec_sha256="ef" * 32,
            part=storage.CheckpointPart(
                element_count=4, digest=digest, size_bytes=32, parameters_length=16
            ),
        ),
        storage.SetPinsRequest(holder="a/1", pins=[storage.Pin(blob=digest)]),
    ]
    found: dict[str, list[Message]] = defaultdict(list)
    for each in made:
        found[each.DESCRIPTOR.full_name].append(each)
    return found


def _specs() -> Iterator[Message]:
    logistic = {"logistic_regression": {}}
    data = {"name": "blobs", "shards": 4}
    train = {"model": logistic, "batch_size": 64, "stop": {"steps": 2}}
    for spec in (
        {"name": "one", "data": data, "train": train},
        {"name": "sums", "data": data, "train": {**train, "local": {"steps": 2}}},
        {
            "name": "grid",
            "sweep": {
                "base": {"name": "one", "data": data, "train": train},
                "grid": {"train.l2": [0.1, 0.2]},
            },
        },
        TASKS,
    ):
        yield job_service_pb2.SubmitJobRequest(spec=as_document(spec).spec)


def _streams(jobs: Sequence[str], digest: str) -> Iterator[Message]:
    node = training_pb2.TreeNode(first=0, span=1)
    for job in jobs:
        hello = exchange.ExchangeHello(job_id=job, term=1, worker_id="worker-77", incarnation="i")
        yield exchange.ExchangeRequest(header=exchange.ExchangeRequestHeader(hello=hello))
        work = task_service_pb2.WorkHello(job_id=job, term=1, worker_id="worker-77", slots=1)
        yield task_service_pb2.WorkRequest(hello=work)
    frame = exchange.ContributionFrame(
        term=1, node=node, vector="gradient", element_count=4, shard_mask=b"\1", example_count=3
    )
    for message in (
        {"frame": frame},
        {"go_record": training_pb2.GoRecord(term=1, version=0)},
        {"recall": exchange.Recall(term=1, version=0, parameters=True, nodes=[node])},
        {"starts_wanted": exchange.StartsWanted(term=1, shards=[0, 1], wanted=1)},
        {"state_wanted": exchange.StateWanted(term=1)},
        {"state_hash": exchange.StateHash(term=1, sha256=digest)},
        {"version_held": exchange.VersionHeld(term=1, held=True)},
    ):
        header: Any = message
        yield exchange.ExchangeRequest(
            header=exchange.ExchangeRequestHeader(**header), payload=bytes(16)
        )
    yield from _sessions(jobs, digest)


def _sessions(jobs: Sequence[str], digest: str) -> Iterator[Message]:
    ids = itertools.cycle(jobs)
    hellos: list[dict[str, Any]] = [
        {
            "worker_hello": coordination.WorkerHello(
                worker_id="worker-77", incarnation="i", fingerprint="f", slots=1, version="0.1.0"
            )
        },
        {
            "aggregator_hello": coordination.AggregatorHello(
                aggregator_id="aggregator-77", incarnation="i", address="127.0.0.1:9"
            )
        },
    ]
    progress = coordination.WorkerJobProgress(job_id=next(ids), term=1, step=1)
    said: list[dict[str, Any]] = [
        {"heartbeat": coordination.Heartbeat(jobs=[progress], cpu_fraction=0.5)},
        {"job_described": coordination.JobDescribed(job_id=next(ids), leaf_sha256=digest)},
        {"worker_job_ready": coordination.WorkerJobReady(job_id=next(ids), term=1)},
        {"leaf_failed": coordination.LeafFailed(job_id=next(ids), term=1, kind=1, shard=0)},
        {"ranges_ready": coordination.RangesReady(job_id=next(ids), term=1)},
        {"job_report": coordination.JobReport(job_id=next(ids), term=1, outcome=1, step=1)},
        {"job_log_lines": coordination.JobLogLines(job_id=next(ids))},
        {"metric_points": coordination.MetricPoints(job_id=next(ids))},
        {"copies_started": coordination.CopiesStarted(job_id=next(ids), term=1, shards=[0])},
    ]
    for each in (*hellos, *said):
        yield coordination.SessionRequest(**each)


def defects_in_logs(folder: Path) -> list[str]:
    """Lines of logs that tell of what nobody expected."""
    return [
        f"{path.name}: {_readable(line)}"
        for path in sorted(folder.iterdir())
        for line in path.read_text(errors="replace").splitlines()
        if any(word in line for word in TRACES)
    ]


def _readable(line: str) -> str:
    try:
        said = json.loads(line)
    except ValueError:
        return line
    trace = str(said.pop("exception", ""))
    return f"{json.dumps(said)[:600]}\n{trace[-1500:]}"


def sizes(ring: Arena) -> dict[str, tuple[int, int, int]]:
    """What each member takes up: bytes of memory, open files, threads."""
    found = {}
    for member in ring.cluster.processes():
        process = psutil.Process(member.pid)
        memory = process.memory_info().rss
        found[member.id] = (memory, process.num_fds(), process.num_threads())
    return found
