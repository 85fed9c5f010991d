"""Programs in the simulator: graphs of tasks, each of which reads what others have left.

The graph is that of a shipped program, a cascade: many layers, and tasks that need one result of
the layer before, two or all. What its tasks compute is made up here, a digest of all that they
read, so that one input more or less, or in another order, gives another result. How each goes wrong
stands in the labels of the job. No real cascade, but sweeps, do what is done here besides: shards
keep something beside their result, and go on from what they have kept in the pass before, if it is
there; and in some programs the passes after one of them are passed over.
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from phalanx.programs import Graph, ModelParts, Outcome, Piece
from phalanx.programs.cascade import MERGE, SHARD, Cascade, Layers, Step
from phalanx.tasks import is_program
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
_ENDS_AFTER = "ends-after"


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
    ends_after: int = 0
    """The pass after which others are passed over; 0: none is."""

    @property
    def calls(self) -> tuple[int, ...]:
        """All of its tasks."""
        spec = JobSpec()
        write(self, "", spec)
        return tuple(range(graph_of_spec(spec).count))

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
    if drawn.shards > 1 and chance.random() < 0.4:
        drawn = replace(drawn, ends_after=chance.randint(1, drawn.passes))
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
    spec.labels.update({"longer": str(each.longer), _ENDS_AFTER: str(each.ends_after)})


def graph(program: Cascade, plan: JobPlan) -> Graph:
    """Stands in for the graph of a cascade: the same, and what may be passed over."""
    return graph_of_spec(JobSpec.FromString(plan.spec))


def graph_of_spec(spec: JobSpec) -> Graph:
    """Which task gets the results of which; of a resolved spec."""
    ends = int(spec.labels[_ENDS_AFTER])
    return _graph(spec.data.shards, spec.cascade.passes, ends)


@functools.lru_cache(maxsize=64)
def _graph(shards: int, passes: int, ends_after: int) -> Graph:
    steps = _steps(shards, passes)
    tops = [task for task, step in enumerate(steps) if step.top]
    passing = [task for task, step in enumerate(steps) if step.kind in (SHARD, MERGE)]
    first = tops[ends_after - 1] + 1 if ends_after else len(steps)
    return Graph(
        tuple(step.needs for step in steps), frozenset(task for task in passing if task >= first)
    )


@functools.lru_cache(maxsize=64)
def _steps(shards: int, passes: int) -> tuple[Step, ...]:
    spec = JobSpec()
    spec.cascade.passes = passes
    return Layers.of(JobPlan(spec=spec.SerializeToString(), shards=shards)).steps


def _ends(spec: JobSpec, task: int) -> bool:
    """Whether a task is the last one before all that is passed over: then its result is empty."""
    tops = [number for number, step in enumerate(_steps_of(spec)) if step.top]
    return tops.index(task) + 1 == int(spec.labels[_ENDS_AFTER]) if task in tops else False


def _steps_of(spec: JobSpec) -> tuple[Step, ...]:
    return _steps(spec.data.shards, spec.cascade.passes)


def arguments_of(spec: JobSpec) -> list[Mapping[str, Any]]:
    """What a set of tasks would have for the arguments of each: how it goes, and how long."""
    return [
        {"how": spec.labels.get(f"task-{task}", ""), "longer": float(spec.labels["longer"])}
        for task in range(graph_of_spec(spec).count)
    ]


def value_of(spec: JobSpec, task: int, inputs: Sequence[bytes]) -> bytes:
    """What a task returns that has read these results."""
    needs = graph_of_spec(spec).needs
    if len(inputs) != len(needs[task]):
        return b"nobody was to be told to read this"
    if task == len(needs) - 1:
        return _outcome(inputs)
    if _ends(spec, task):
        return b""
    whole = hashlib.sha256(f"{spec.name} {task}".encode())
    for each in inputs:
        whole.update(hashlib.sha256(each).digest())
    head = whole.digest()
    numbers = np.sin(np.arange(_NUMBERS + task % 3) + int.from_bytes(head[:4], "little") * 1e-6)
    content: bytes = numbers.astype("<f8").tobytes()
    return head + content


def kept_by(spec: JobSpec, task: int) -> bytes:
    """What a task keeps for those that may go on from it: of a shard what it has solved."""
    if not is_program(spec) or _steps_of(spec)[task].kind != SHARD:
        return b""
    return hashlib.sha256(f"kept by {spec.name} {task}".encode()).digest()


def earlier_by(spec: JobSpec, task: int) -> tuple[int, ...]:
    """Which tasks those that get the result of a task go on from: shards of a pass from themselves
    in the pass before, as its top says."""
    if not is_program(spec) or not _steps_of(spec)[task].top:
        return ()
    return tuple(_earlier(spec, task, user) for user in _users(spec, task))


def goes_on_from(spec: JobSpec, task: int) -> int:
    """The task that one goes on from; less than 0: none."""
    needs = graph_of_spec(spec).needs[task]
    return _earlier(spec, needs[0], task) if needs else -1


def _users(spec: JobSpec, task: int) -> list[int]:
    return [user for user, needs in enumerate(graph_of_spec(spec).needs) if task in needs]


def _earlier(spec: JobSpec, top: int, user: int) -> int:
    steps = _steps_of(spec)
    if steps[user].kind != SHARD or not steps[top].top:
        return -1
    same = [
        each
        for each in range(top)
        if (steps[each].kind, steps[each].number) == (SHARD, steps[user].number)
    ]
    return same[-1] if same else -1


def _outcome(inputs: Sequence[bytes]) -> bytes:
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
    made, values = graph_of_spec(spec), list[bytes]()
    for task, needs in enumerate(made.needs):
        inputs = [values[each] for each in needs]
        over = task in made.passing and not inputs[-1]
        values.append(inputs[0] if over else value_of(spec, task, inputs))
    return values


def wrong_with(spec: JobSpec, result: Any) -> str:
    """What is wrong with what a program has left; nothing: it is as it should be."""
    values = values_of(spec)
    outcome = Outcome.from_json(values[-1])
    inputs = [values[each] for each in graph_of_spec(spec).needs[-1]]
    model = b"".join(each[_HEAD_BYTES:] for each in inputs[1:])
    files = [(each.name, each.digest, each.size_bytes) for each in result.files]
    found = result.parameters_sha256, files, result.metrics[METRIC]
    expected = _digest(model), [(FILE, _digest(inputs[0]), len(inputs[0]))], outcome.metrics[METRIC]
    return "" if found == expected else f"has left {found} instead of {expected}"


def _digest(value: bytes) -> str:
    return hashlib.sha256(value).hexdigest()
