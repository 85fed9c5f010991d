"""Workers without a network that vote on contributions, some of which lie."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from coordinator.aggregation.core.effects import Ask, Caught, Verified
from coordinator.aggregation.core.making import make_ranges
from phalanx.copies import PATIENCE_UNMEASURED_S
from phalanx.frames import BLOCK_ELEMENTS
from phalanx.reduction import Node
from phalanx.testing.ranges import Frame, ScriptedJob, make_plan, reference
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import GoRecord, JobPlan

SHARDS = 5
TWO_FRAMES = 5 * BLOCK_ELEMENTS + 11
TRAIN = GoRecord.ACTION_TRAIN
SECRET = 0x5EC2E7

Lie = Callable[[str, GoRecord, int], bool]
"""Whether a worker lies about a shard in the round of a go record."""


def verified_plan(
    *, replicas: int = 3, audit: float | None = None, elements: int = 600, **options: Any
) -> JobPlan:
    options = {"steps": 3, "evaluation_shards": 3, "evaluate_every": 2, **options}
    plan = make_plan(elements=elements, shards=SHARDS, optimizer="adam", **options)
    spec = JobSpec.FromString(plan.spec)
    if audit is None:
        spec.train.verification.replicas = replicas
    else:
        spec.train.verification.audit_fraction = audit
    plan.spec = spec.SerializeToString()
    plan.unit_span, plan.verified = 1, True
    return plan


class Voters:
    """Workers without a network: each sends its home, and what it is asked for."""

    def __init__(
        self,
        plan: JobPlan,
        workers: int = 4,
        lie: Lie = lambda *_: False,
        seed: int = 0,
        secret: int = SECRET,
    ) -> None:
        self.job = ScriptedJob(lambda *given: make_ranges(*given, secret=secret), plan)
        self.ranges = self.job.root
        self.lie = lie
        self.draw = random.Random(seed)
        self.keys: dict[str, object] = {}
        self.asked: list[tuple[str, tuple[int, int], Node]] = []
        self.ever_asked: list[tuple[int, int]] = []
        """Version and shard of every copy that somebody was asked for."""
        self.due: list[tuple[str, Frame]] = []
        self.caught: list[Caught] = []
        self.verified = 0
        self.now_s = 0.0
        self.homes: dict[int, str] = {}
        self.names = [f"w{number}" for number in range(1, workers + 1)]
        for name in self.names:
            self.connect(name)
        self.perform(self.ranges.begin())
        self.job.pull()

    def connect(self, name: str, incarnation: str = "one") -> None:
        self.keys[name] = object()
        self.ranges.stream_opened(self.keys[name], name, incarnation)

    def disconnect(self, name: str) -> None:
        self.ranges.stream_closed(self.keys.pop(name))
        self.due = [each for each in self.due if each[0] != name]

    def perform(self, effects: list[Any]) -> None:
        for effect in effects:
            if isinstance(effect, Ask):
                order = effect.order
                self.asked += [(order.worker_id, order.key, node) for node in order.nodes]
                self.ever_asked += [(order.key[0], node.first) for node in order.nodes]
            elif isinstance(effect, Caught):
                self.caught.append(effect)
            self.verified += isinstance(effect, Verified)
        self.job.effects += effects
        while self.ranges.works:
            self.perform(self.ranges.work(self.now_s))

    def frames(self, name: str, shard: int, *, copy: bool, **options: Any) -> list[Frame]:
        """What a worker sends of one shard in the newest round."""
        go = self.job.go
        frames = self.job.nodes_frames([Node(shard, 1)], go, copy=copy, **options)
        if self.lie(name, go, shard):
            header, payload = frames[-1]
            wrong = bytearray(payload)
            wrong[-1] ^= 1 + int(name[1:])
            frames[-1] = header, memoryview(bytes(wrong))
        return frames

    def send(self, name: str, frames: list[Frame]) -> None:
        for frame in frames:
            if name in self.keys:
                self.perform(self.ranges.contribute(*frame, self.now_s, self.keys[name]))

    def deliver(self, name: str, shard: int, *, copy: bool = False) -> None:
        self.send(name, self.frames(name, shard, copy=copy))

    def home(self, shard: int) -> str:
        return self.homes.get(shard, self.names[shard % len(self.names)])

    def take_asked(self) -> list[tuple[str, int]]:
        """Who was asked for which shards of the open round since the last call."""
        go = self.job.go
        asked = [each for each in self.asked if each[1] == (go.version, go.round)]
        self.asked.clear()
        return [(name, node.first) for name, _, node in asked]

    def run_round(self) -> GoRecord:
        """Frames of all workers in any order, until the round is over."""
        go = self.job.go
        width = self.job.leaves.width(go)
        self.due = []
        for shard in range(width):
            self._owe(self.home(shard), shard, copy=False)
        while self.job.go is go:
            if not self.due and not self.asked:
                # Who delivers a shard of one that was caught is not known yet.
                self.now_s += PATIENCE_UNMEASURED_S
                self.perform(self.ranges.look(self.now_s))
            for name, shard in self.take_asked():
                self._owe(name, shard, copy=True)
            assert self.due, f"nobody is asked for what is missing in {go}"
            name, frame = self.due.pop(self.draw.randrange(len(self.due)))
            self.send(name, [frame])
            self.job.pull()
        return go

    def _owe(self, name: str, shard: int, *, copy: bool) -> None:
        if name in self.keys:
            self.due += [(name, frame) for frame in self.frames(name, shard, copy=copy)]

    def run(self) -> ScriptedJob:
        while self.job.go.action not in (GoRecord.ACTION_STOP, GoRecord.ACTION_FAIL):
            self.run_round()
        assert self.job.go.action == GoRecord.ACTION_STOP
        return self.job


def final_bytes(plan: JobPlan) -> bytes:
    return bytes(reference(plan)[-1].tobytes())
