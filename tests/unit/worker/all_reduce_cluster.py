"""Members of one all-reduce job: the cores that ship, joined by queues instead of sockets.

Whatever could happen next is chosen by a seed: a message arrives on some stream, a leaf ends, a
slice of an update is done. Members can be killed before any of these.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter, deque
from functools import cache

import numpy as np

from phalanx.frames import BLOCK_ELEMENTS, decode_request, decode_response, encode_request
from phalanx.given import KEY_BYTES, sealed
from phalanx.optimizers import build_optimizer
from phalanx.reduction import cover, reduce_leaves
from phalanx.v1 import aggregation_service_pb2 as exchange
from phalanx.v1 import coordination_service_pb2 as coordination
from phalanx.v1 import job_spec_pb2, training_pb2
from worker.core import effects as do
from worker.core.all_reduce.job import AllReduceJob
from worker.core.dispatch import Dispatcher
from worker.session.payloads import FrameBuilder

GoRecord = training_pb2.GoRecord
STEPS_MAX = 200_000


def spec_of(steps: int, every: int = 0) -> job_spec_pb2.JobSpec:
    spec = job_spec_pb2.JobSpec()
    train = spec.train
    adam = train.optimizer.adam
    adam.learning_rate, adam.beta1, adam.beta2, adam.epsilon = 0.01, 0.9, 0.999, 1e-8
    train.all_reduce.SetInParent()
    train.synchronous.SetInParent()
    train.stop.steps = steps
    train.checkpoints.every_steps = every
    return spec


def plan_of(spec: job_spec_pb2.JobSpec, shards: int, elements: int) -> training_pb2.JobPlan:
    plan = training_pb2.JobPlan(
        job_id="job-1",
        spec=spec.SerializeToString(),
        shards=shards,
        train_rows=shards * 4,
        rows_per_leaf=4,
        steps_per_epoch=1,
        total_steps=spec.train.stop.steps,
        bitwise=True,
    )
    plan.layout.dtype = "float32"
    plan.layout.element_count = elements
    plan.layout.tensors.add(name="w", shape=[elements], decay=True)
    return plan


def leaf(parameters: np.ndarray, shard: int, step: int) -> np.ndarray:
    return noise(len(parameters), shard, step) + parameters * np.float32(shard + 1)


@cache
def noise(elements: int, shard: int, step: int) -> np.ndarray:
    drawn = np.random.Generator(np.random.Philox(key=[shard, step])).standard_normal(elements)
    return drawn.astype(np.float32)


def initial(elements: int) -> np.ndarray:
    return np.linspace(-1, 1, elements).astype(np.float32)


def loss_of(shard: int, step: int) -> float:
    return 1 / (3 + shard + step)


def reference(plan: training_pb2.JobPlan, steps: int) -> list[np.ndarray]:
    """The parameters of every version, computed in one place."""
    optimizer = build_optimizer(job_spec_pb2.JobSpec.FromString(plan.spec).train, plan.total_steps)
    elements = plan.layout.element_count
    versions = [initial(elements)]
    state = {name: np.zeros(elements, np.float32) for name in optimizer.state_names}
    decay = np.ones(elements, np.bool_)
    for step in range(steps):
        before = versions[-1]
        total = reduce_leaves({s: leaf(before, s, step) for s in range(plan.shards)}, plan.shards)
        out = np.empty_like(before)
        optimizer.apply(before, total, plan.train_rows, decay, state, step, out)
        versions.append(out)
    return versions


class Arena:
    """Buffers of one member."""

    dtype = np.dtype("float32")

    def __init__(self, elements: int) -> None:
        self._elements = elements
        self._buffers: dict[int, np.ndarray] = {}

    def array(self, buffer: int) -> np.ndarray:
        if buffer not in self._buffers:
            self._buffers[buffer] = np.full(self._elements, np.nan, self.dtype)
        return self._buffers[buffer]


class Member:
    """One worker: what its session process would do, without a process."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.cluster, self.name = cluster, name
        self.arena = Arena(cluster.plan.layout.element_count)
        self.dispatcher = Dispatcher(1)
        self.dispatcher.slot_idle(0)
        counter = itertools.count(1)
        self.core = AllReduceJob(cluster.plan, self.dispatcher, lambda: next(counter), name)
        self.core.attach(self.arena.array)
        self.core.elapsed = lambda: cluster.now_s
        #: Its leaf never ends; its process does nothing at all.
        self.hangs = self.stopped = False
        self.told: list[coordination.CopiesStarted] = []
        self.builder = FrameBuilder()
        self.running = deque()
        self.committed: list[int] = []
        self.failures: list[str] = []
        self.stored: list[int] = []
        #: By version: what a checkpoint of it would hold.
        self.copies: dict[int, dict[str, np.ndarray]] = {}
        self.ended = None
        self.sent_bytes: Counter[int] = Counter()

    def assign(self, message: coordination.AssignJob) -> None:
        first = self.core.term == 0
        self.take(self.core.assign(message))
        if first:
            self.take(self.core.prepare_done("leaf"))

    def take(self, effects: list[do.Effect]) -> None:
        for effect in effects:
            match effect:
                case do.OpenStreams():
                    self.cluster.open_streams(self, effect)
                case do.Wake() if effect.aggregator_id == self.name:
                    self.loop_back()
                case do.Snapshot():
                    copy = self.copies[effect.version] = self.core.replica.copy()
                    digest = hash(tuple(vector.tobytes() for vector in copy.values()))
                    self.take(self.core.hashed(effect.version, str(digest)))
                case do.Store():
                    self.stored.append(effect.go.version)
                    self.core.root.checkpoint_done(effect.go.version)
                case do.Committed():
                    self.committed.append(effect.version)
                    self.cluster.committed.append((self.core.term, effect.version))
                    assert effect.example_count == self.cluster.plan.train_rows
                case do.Ended():
                    self.ended = effect.go
                case do.Fail():
                    self.failures.append(effect.reason)
                case do.Report() if effect.message.HasField("copies_started"):
                    self.told.append(effect.message.copies_started)
        for task in self.dispatcher.start():
            self.running.append(task)

    def loop_back(self) -> None:
        while (out := self.core.next_message(self.name)) is not None:
            header, payload = decode_request(self.builder.encode(out, self.arena))
            self.take(self.core.contribute(header.frame, payload))

    def end_leaf(self) -> None:
        task = self.running.popleft()
        core = self.core
        for part in task.parts:
            if task.cancelled or not core.owns(task):
                continue
            out = self.arena.array(part.buffer)
            if task.round.go.action == GoRecord.ACTION_INITIALISE:
                out[:] = initial(len(out))
                self.take(core.part_done(task, part, 0, 0.0, 1, ()))
                continue
            if task.round.is_evaluation:
                loss = self.cluster.evaluated.get(task.round.go.version, 2.0)
                self.take(core.part_done(task, part, 4, 0.0, 1, (loss,)))
                continue
            width, step = task.round.width, task.round.go.version
            shards = [
                s for s in range(part.node.first, part.node.first + part.node.span) if s < width
            ]
            parameters = self.arena.array(task.parameters)
            made = reduce_leaves(
                {s - part.node.first: leaf(parameters, s, step) for s in shards}, len(shards)
            )
            out[:] = made
            losses = [loss_of(s, step) for s in shards]
            mask = (1 << len(shards)) - 1
            self.take(core.part_done(task, part, 4 * len(shards), _tree(losses), mask, ()))
        self.dispatcher.slot_idle(0)
        if core.owns(task):
            self.take(core.task_ended(task))
        self.take([])


def _tree(losses: list[float]) -> float:
    total = reduce_leaves({i: np.array([x]) for i, x in enumerate(losses)}, len(losses))
    return float(total[0])


class Stream:
    """From a member to an owner, and back."""

    def __init__(self, cluster: Cluster, client: Member, server: Member, hello) -> None:
        self.client, self.server, self.hello = client, server, hello
        self.up: deque[bytes] = deque()
        self.down: deque[bytes] = deque()
        self.opened = False
        #: Proofs of what the client was given that the server has seen; the first with the hello.
        self.shown = 1


class Cluster:
    """All members, and what control does: terms, members, placement."""

    def __init__(
        self,
        seed: int,
        plan: training_pb2.JobPlan,
        names: list[str],
        stops: list[int] | None = None,
    ) -> None:
        self.random = random.Random(seed)
        #: Every other cluster is one in which callers prove who they are.
        self.seal_key = bytes(KEY_BYTES) if seed % 2 else b""
        self.plan = plan
        self.members: dict[str, Member] = {}
        self.streams: list[Stream] = []
        self.now_s = 0.0
        self.term = 0
        self.committed: list[tuple[int, int]] = []
        self.events = 0
        self.delivered: Counter[str] = Counter()
        #: By version: what an evaluation gives; elsewhere it is 2.
        self.evaluated: dict[int, float] = {}
        self.change(names, stops)

    def change(self, names: list[str], stops: list[int] | None = None) -> None:
        """A new term with these members; those that are new start empty. `stops` are the ends of
        their shards, where these are not as even as can be."""
        self.term += 1
        self.members = {name: self.members.get(name) or Member(self, name) for name in names}
        elements = self.plan.layout.element_count
        blocks = -(-elements // BLOCK_ELEMENTS)
        owning = min(blocks, len(names))
        cuts = [index * blocks // owning * BLOCK_ELEMENTS for index in range(owning)]
        cuts += [elements] * (len(names) - owning + 1)
        ranges = [
            training_pb2.ParameterRange(
                index=index,
                first_element=cuts[index],
                element_count=cuts[index + 1] - cuts[index],
                aggregator_id=name,
                address=name,
            )
            for index, name in enumerate(names)
        ]
        stops = stops or [
            round((index + 1) * self.plan.shards / len(names)) for index in range(len(names))
        ]
        first = 0
        for name, stop in zip(names, stops, strict=True):
            nodes = [
                training_pb2.TreeNode(first=node.first, span=node.span)
                for node in cover(first, stop, self.plan.shards)
            ]
            first = stop
            # Where there is an evaluation the last one computes it.
            evaluates = self.plan.evaluation_shards and name == names[-1]
            given = training_pb2.GivenNodes(
                job_id="job-1",
                term=self.term,
                worker_id=name,
                train_nodes=nodes,
                evaluation_nodes=[training_pb2.TreeNode(span=1)] if evaluates else [],
            )
            self.members[name].assign(
                coordination.AssignJob(
                    plan=self.plan,
                    term=self.term,
                    ranges=ranges,
                    placement=1,
                    train_nodes=given.train_nodes,
                    evaluation_nodes=given.evaluation_nodes,
                    given=sealed(self.seal_key, given),
                    seal_key=self.seal_key,
                )
            )

    def open_streams(self, client: Member, effect: do.OpenStreams) -> None:
        self.streams = [stream for stream in self.streams if stream.client is not client]
        for name, _ in effect.owners:
            hello = exchange.ExchangeHello(job_id="job-1", term=effect.term, worker_id=client.name)
            if effect.held >= 0:
                hello.held_version = effect.held
            if client.core.given:
                hello.given.CopyFrom(client.core.given[0])
            self.streams.append(Stream(self, client, self.members[name], hello))

    def kill(self, name: str) -> None:
        self.streams = [
            stream
            for stream in self.streams
            if name not in (stream.client.name, stream.server.name)
        ]
        del self.members[name]

    # -- what can happen next

    def actions(self) -> list:
        found = []
        for member in self.members.values():
            if member.stopped:
                continue
            if member.running and not member.hangs:
                found.append((member.end_leaf,))
            if member.core.works:
                found.append((lambda m=member: m.take(m.core.work()),))
        for stream in self.streams:
            client, server = stream.client, stream.server
            if client.stopped or server.stopped:
                continue
            if not stream.opened:
                if server.core.joined and server.core.term == client.core.term:
                    found.append((self.open, stream))
                continue
            if server.core.term != stream.hello.term:
                continue  # that end has closed it
            found += [(self.up, stream)] if self.fill_up(stream) else []
            found += [(self.down, stream)] if self.fill_down(stream) else []
        return found

    def open(self, stream: Stream) -> None:
        stream.opened = True
        stream.server.take(stream.server.core.member_opened(stream, stream.hello))
        stream.client.take(stream.client.core.stream_opened(stream.server.name))

    def fill_up(self, stream: Stream) -> bool:
        if not stream.up and stream.client.core.term == stream.hello.term:
            core, name = stream.client.core, stream.server.name
            message = core.next_due(name)
            if message is None and stream.shown < len(core.given):
                shown = exchange.ExchangeRequestHeader(given=core.given[stream.shown])
                message = encode_request(shown)
                stream.shown += 1
            if message is None and (out := core.next_message(name)) is not None:
                message = stream.client.builder.encode(out, stream.client.arena)
            if message is not None:
                stream.up.append(message)
                payload = decode_request(message)[1]
                stream.client.sent_bytes[core.replica.version] += len(payload)
        return bool(stream.up)

    def fill_down(self, stream: Stream) -> bool:
        if not stream.down:
            message = stream.server.core.next_served(stream)
            if message is not None:
                stream.down.append(message)
                header, payload = decode_response(message)
                step = header.reduced.version if header.HasField("reduced") else -1
                stream.server.sent_bytes[step] += len(payload)
        return bool(stream.down)

    def up(self, stream: Stream) -> None:
        header, payload = decode_request(stream.up.popleft())
        self.delivered[header.WhichOneof("message")] += 1
        stream.server.take(stream.server.core.member_said(stream, header, payload))

    def down(self, stream: Stream) -> None:
        header, payload = decode_response(stream.down.popleft())
        kind = header.WhichOneof("message")
        self.delivered[kind if kind != "state" else f"state {header.state.vector}"] += 1
        if kind == "go_record":
            stream.client.take(stream.client.core.go_record(header.go_record))
        elif kind == "copy_nodes":
            stream.client.take(stream.client.core.copy_nodes(header.copy_nodes))
        else:
            stream.client.take(stream.client.core.owner_said(header, payload))

    def run(self, until=None, events: int = STEPS_MAX) -> bool:
        """Let things happen until the job has ended; False: so many events came before."""
        for _ in range(events):
            found = self.actions()
            if not found:
                break
            act, *arguments = self.random.choice(found)
            act(*arguments)
            self.events += 1
            if until is not None and until():
                return True
        return self.ended

    def wait(self, seconds: float, until=None, each_s: float = 0.05) -> bool:
        """Let time pass, and things happen as they may; whether `until` came true."""
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            self.run(until=until)
            if until is not None and until():
                return True
            self.now_s += each_s
            for member in self.members.values():
                if not member.stopped:
                    member.take(member.core.look())
        return False

    @property
    def ended(self) -> bool:
        return (
            any(member.ended is not None for member in self.members.values()) and not self.actions()
        )

    @property
    def versions(self) -> set[int]:
        return {member.core.replica.version for member in self.members.values()}
