"""Programs in the simulator: graphs of tasks, each of which reads what others have left.

The graph is that of a shipped program, a cascade: many layers, and tasks that need one result of
the layer before, two or all. What its tasks compute is made up here, a digest of all that they
read, so that one input more or less, or in another order, gives another result. How each goes wrong
stands in the labels of the job.
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from phalanx.programs import ModelParts, Outcome, Piece, graph_of
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.task_service_pb2 import StoredValue
from phalanx.v1.training_pb2 import JobPlan, Layout, TensorSpec

SHARE = 0.05
"""Part of the swarm's runs that have programs, where nothing else that is seldom is drawn."""
STRIKES = (
    "",
    "tasks_journalled aggregator kill",
    "tasks_journalled worker kill",
    "tasks_journalled storage kill",
    "tasks_journalled worker reset",
)
"""What may come again and again in these: storage has results, and others wait for them."""

HARMLESS = ("slow", "once", "dies once")
POISON = ("raises", "crashes", "stillborn")
FILE = "top.bin"
METRIC = "test/checked"
_HEAD_BYTES, _NUMBERS = 32, 5


@dataclass(frozen=True)
class ProgramSet:
    """What makes one program differ from another; for its user a set of tasks as any other."""

    shards: int = 4
    passes: int = 2
    hows: tuple[tuple[int, str], ...] = ()
    """Tasks that do not go as any other: one of `HARMLESS` or `POISON`."""
    longer: float = 1.0
    """How much longer than a leaf a task takes."""
    failures_max: int | None = 0

    @property
    def calls(self) -> tuple[int, ...]:
        """All of its tasks."""
        return tuple(range(len(needs_of(self.shards, self.passes))))

    @property
    def poison(self) -> frozenset[int]:
        """Tasks that fail wherever they run, so that the program fails until it is mended."""
        return frozenset(task for task, how in self.hows if how in POISON)


def draw_program(chance: random.Random) -> ProgramSet:
    """Draw a program."""
    drawn = ProgramSet(
        shards=chance.choice([1, 2, 3, 5]),
        passes=chance.choice([1, 2, 3]),
        longer=chance.choice([0.5, 2.0, 4.0]),
    )
    hows = {chance.choice(drawn.calls): how for how in HARMLESS if chance.random() < 0.4}
    if chance.random() < 0.25:
        hows[chance.choice(drawn.calls)] = chance.choice(POISON)
    return replace(drawn, hows=tuple(sorted(hows.items())))


def drawn(settings: Any, chance: random.Random) -> Any:
    """The settings of a run of the swarm, in some of which there are programs."""
    taken = settings.parts or settings.wishes or settings.liars or settings.last
    taken = taken or settings.neighbour or settings.newcomer or settings.stranger
    taken = taken or settings.strike or settings.tasks
    if taken or chance.random() >= SHARE:
        return settings
    shapes = settings.shapes[: chance.choice([0, 0, 0, 1])]
    strike, programs = chance.choice(STRIKES), chance.choice([1, 2])
    return replace(settings, programs=programs, shapes=shapes, strike=strike)


def write(each: ProgramSet, dataset: str, spec: JobSpec) -> None:
    """Have a spec describe a program."""
    spec.data.name, spec.data.shards = dataset, each.shards
    cascade = spec.cascade
    cascade.c, cascade.gamma, cascade.passes = 1.0, 0.5, each.passes
    spec.labels.update({f"task-{task}": how for task, how in each.hows})
    spec.labels["longer"] = str(each.longer)


@functools.lru_cache(maxsize=64)
def needs_of(shards: int, passes: int) -> tuple[tuple[int, ...], ...]:
    """By task: those whose results it gets."""
    spec = JobSpec()
    spec.cascade.passes = passes
    return graph_of(JobPlan(spec=spec.SerializeToString(), shards=shards)).needs


def needs_of_spec(spec: JobSpec) -> tuple[tuple[int, ...], ...]:
    """The same of a resolved spec."""
    return needs_of(spec.data.shards, spec.cascade.passes)


def arguments_of(spec: JobSpec) -> list[Mapping[str, Any]]:
    """What a set of tasks would have for the arguments of each: how it goes, and how long."""
    return [
        {"how": spec.labels.get(f"task-{task}", ""), "longer": float(spec.labels["longer"])}
        for task in range(len(needs_of_spec(spec)))
    ]


def value_of(spec: JobSpec, task: int, inputs: Sequence[bytes]) -> bytes:
    """What a task returns that has read these results."""
    needs = needs_of_spec(spec)
    if task == len(needs) - 1:
        return _outcome(spec, needs[task], inputs)
    whole = hashlib.sha256(f"{spec.name} {task}".encode())
    for each in inputs:
        whole.update(hashlib.sha256(each).digest())
    head = whole.digest()
    numbers = np.sin(np.arange(_NUMBERS + task % 3) + int.from_bytes(head[:4], "little") * 1e-6)
    return head + numbers.astype("<f8").tobytes()


def _outcome(spec: JobSpec, needs: Sequence[int], inputs: Sequence[bytes]) -> bytes:
    """The last task's: a number, a file, and a model of pieces of what others have left."""
    stored = [StoredValue(digest=_digest(each), size_bytes=len(each)) for each in inputs]
    pieces = [Piece(each.digest, _HEAD_BYTES, each.size_bytes - _HEAD_BYTES) for each in stored[1:]]
    count = sum(each.length for each in pieces) // 8
    tensors = [TensorSpec(name="vectors", shape=[count])]
    layout = Layout(tensors=tensors, dtype="float64", element_count=count)
    checked = float(int.from_bytes(inputs[0][:6], "little"))
    model = ModelParts(layout, tuple(pieces))
    return Outcome({METRIC: checked}, model, {FILE: stored[0]}).to_json()


def values_of(spec: JobSpec) -> list[bytes]:
    """The results of all tasks, one after another, in one process."""
    values: list[bytes] = []
    for task, needs in enumerate(needs_of_spec(spec)):
        values.append(value_of(spec, task, [values[each] for each in needs]))
    return values


def wrong_with(spec: JobSpec, result: Any) -> str:
    """What is wrong with what a program has left; nothing: it is as it should be."""
    values = values_of(spec)
    outcome = Outcome.from_json(values[-1])
    inputs = [values[each] for each in needs_of_spec(spec)[-1]]
    model = b"".join(each[_HEAD_BYTES:] for each in inputs[1:])
    files = [(each.name, each.digest, each.size_bytes) for each in result.files]
    found = result.parameters_sha256, files, result.metrics[METRIC]
    expected = _digest(model), [(FILE, _digest(inputs[0]), len(inputs[0]))], outcome.metrics[METRIC]
    return "" if found == expected else f"has left {found} instead of {expected}"


def _digest(value: bytes) -> str:
    return hashlib.sha256(value).hexdigest()
