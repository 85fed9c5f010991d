"""What a worker's session process meets on its machine: leaf processes, shared memory, a cache.

A leaf runs in virtual time. It reads the parameters when it *ends*, so a buffer that is overwritten
under a running leaf gives wrong bits, as it would in a real process.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.compressors import Key, compress_in_place
from phalanx.reduction import Node, all_finite
from phalanx.testing.simulation.loop import SimulationFailed, World
from phalanx.training.leaf import LocalSteps
from phalanx.v1 import coordination_service_pb2, training_pb2
from phalanx.v1.job_spec_pb2 import JobSpec
from tests.simulation import jobs, versions, wishes
from tests.simulation.parts import VERIFIED
from tests.simulation.task_sets import Calls
from worker import ipc
from worker.core.logs import LINE_LIMIT_BYTES
from worker.ipc import Kind, Message
from worker.leaf.reduce import Scratch, Sums, reduce_node
from worker.leaf.states import NodeState

GoRecord = training_pb2.GoRecord
LeafFailed = coordination_service_pb2.LeafFailed
SIGKILL = -9
CHAT_LINES = 3000
DEADLY_TIMES = 2
"""How often a deadly leaf kills the process that starts leaf processes: the second time it is known
that this was no chance; elsewhere it runs well."""
LIARS = 3
"""Lies are about every third leaf."""


class Machines:
    """What is the same for all workers of one run."""

    def __init__(self, world: World, leaf_s: Callable[[str], float]) -> None:
        self.world = world
        self.leaf_s = leaf_s
        self.arenas: dict[int, Arena] = {}
        self.files: dict[tuple[str, str], bytes] = {}
        self.hung: set[str] = set()
        """Workers whose present leaf never ends."""
        self.bad: set[str] = set()
        """Workers whose next leaf gives no finite number."""
        self._struck: dict[tuple[str, int, int, int], str] = {}
        self.liars: dict[str, int] = {}
        """Workers that lie about some leaves where that must not change anything, each about
        other ones: those with its number."""
        self.unequal = False
        """Whether they all lie about the same leaves instead, each something else."""
        self.from_the_first = False
        """Whether they lie in what they say of a job before it begins as well."""
        self.false_leaves: set[str] = set()
        """What they said of it."""
        self.lies = 0
        self.fingerprints: dict[str, str] = {}
        self.odd: set[str] = set()
        """Workers whose own leaves have other bits, whatever their fingerprint says."""
        self.old: set[str] = set()
        """Workers with an older version of what all jobs need, see `versions`."""
        self._leaves: dict[str, str] = {}
        self.small: set[str] = set()
        """Aggregators that have not the memory for any range."""
        self.crashed: set[str] = set()
        """Jobs of which a leaf process has crashed, as it must once."""
        self.deadly: Counter[str] = Counter()
        """How often a leaf of a job has killed the process that starts leaf processes."""
        self.orphaned = 0
        """Leaf processes that ended with the one that had started them."""
        self.leaves: dict[str, list[Leaf]] = {}
        """Every leaf process that a worker was given."""
        self.calls = Calls()

    def strikes(self, what: str, worker: str, leaf: tuple[str, int, int, int]) -> bool:
        """Whether a leaf (job, action, version, shard) hangs, or is bad, on a worker where the next
        one does; twice the same leaf, and the job rightly fails."""
        where = self.hung if what == "hung" else self.bad
        return worker in where and self._struck.setdefault(leaf, what) == what

    def leaf_of(self, worker: str) -> str:
        """The hash of the bits that a worker's own leaf of a job has."""
        return ("1" if worker in self.odd else "0") * 64

    def said_leaf_of(self, worker: str, parts: str) -> str:
        """What it says of that hash; no two that lie say the same."""
        if self.from_the_first and worker in self.liars and parts in VERIFIED:
            self.lies += 1
            lie = str(2 + self.liars[worker]) * 64
            self.false_leaves.add(lie)
            return lie
        return self.leaf_of(worker)

    def end_leaf_server(self, worker: str) -> None:
        """The process that starts a worker's leaf processes is gone, and they with it; to be called
        as that worker."""
        for leaf in self.leaves.get(worker, []):
            leaf.end_orphaned()

    def demand_same_leaf(self, job_id: str, worker: str) -> None:
        """All leaves of a job run where they have the same bits."""
        first = self._leaves.setdefault(job_id, worker)
        if self.leaf_of(first) != self.leaf_of(worker):
            self.world.fail(SimulationFailed(f"{job_id} runs on {first} and {worker}"))

    def demand_wanted(self, spec: JobSpec, worker: str) -> None:
        """No job is set up where it must not be computed."""
        if not wishes.may_compute(spec, worker):
            self.world.fail(SimulationFailed(f"{spec.name} is set up by {worker}, out of its zone"))

    def demand_version(self, plan: training_pb2.JobPlan, worker: str) -> None:
        """No job is set up where it is known that it would have other bits."""
        if versions.misplaced(plan, worker, self.old):
            why = f"{plan.job_id} is set up by {worker}, which has another version"
            self.world.fail(SimulationFailed(why))


class Arena:
    """Shared memory without sharing."""

    def __init__(self, machines: Machines, element_count: int, dtype: np.dtype[Any]) -> None:
        self.fd = len(machines.arenas) + 1
        self.element_count = element_count
        self.dtype = dtype
        self._arrays: dict[int, NDArray[Any]] = {}
        machines.arenas[self.fd] = self

    def array(self, buffer: int) -> NDArray[Any]:
        array = self._arrays.get(buffer)
        if array is None:
            array = self._arrays[buffer] = np.zeros(self.element_count, self.dtype)
        return array

    def raw(self, buffer: int) -> NDArray[np.uint8]:
        return self.array(buffer).view(np.uint8)

    def reserve(self, buffer: int) -> None:
        pass

    def close(self) -> None:
        self._arrays.clear()


class Page:
    """What a leaf process says of itself without being asked."""

    def __init__(self) -> None:
        self.task = 0
        self.shard = -1
        self.step = 0
        self.leaves = 0
        self.cancelled_task = 0

    def cancel(self, task: int) -> None:
        self.cancelled_task = task

    def leaf_seconds(self, now_ns: int) -> float:
        return 0.0

    def close(self) -> None:
        pass


class Leaf:
    """Stands in for `worker.session.process.LeafProcess`."""

    def __init__(
        self,
        machines: Machines,
        on_message: Callable[[Any, Message], None],
        on_log: Callable[[Any, str, bytes], None],
        on_exit: Callable[[Any, int], None],
    ) -> None:
        self.page = Page()
        self.ready = False
        self.known_jobs: set[int] = set()
        self.killed_as_hung = self.orphaned = False
        self.pid = 0
        self._machines = machines
        self._loop = machines.world.loop
        self._worker = self._loop.current.name
        self._fingerprint = machines.fingerprints.get(self._worker, jobs.FINGERPRINTS[0])
        self._on_message = on_message
        self._on_log = on_log
        self._on_exit = on_exit
        self._dead = False
        self._plans: dict[int, tuple[jobs.Shape, training_pb2.JobPlan, Arena]] = {}
        self._scratch: dict[int, Scratch] = {}
        self._local: dict[int, LocalSteps] = {}
        self._orders: deque[tuple[Kind, bytes, tuple[int, ...]]] = deque()
        self._busy = True
        self._process = self._loop.current
        machines.leaves.setdefault(self._worker, []).append(self)
        self._loop.call_later(0.01, self._up)

    def send(self, kind: Kind, body: bytes = b"", fds: tuple[int, ...] = ()) -> None:
        self._orders.append((kind, body, fds))
        if not self._busy:
            self._busy = True
            self._loop.call_later(0.0002, self._next)

    def kill(self) -> None:
        if not self._dead:
            self._dead = True
            self._loop.call_later(0.001, self._on_exit, self, SIGKILL)

    def hung(self) -> None:
        self.killed_as_hung = True
        self._machines.hung.discard(self._worker)
        self.kill()

    def end_orphaned(self) -> None:
        """The process that has started this one is gone."""
        if not self._dead and self._process.alive:
            self.orphaned = True
            self._machines.orphaned += 1
            self.kill()

    def was_out_of_memory(self, code: int) -> bool:
        return False

    # Inside

    def _up(self) -> None:
        self._say(Kind.READY)
        self._next()

    def _say(self, kind: Kind, body: bytes = b"") -> None:
        if not self._dead:
            self._on_message(self, Message(kind, body))

    def _next(self) -> None:
        self._busy = False
        while self._orders and not self._busy and not self._dead:
            self._busy = True
            kind, body, fds = self._orders.popleft()
            if kind is Kind.RUN:
                self._begin(ipc.RunOrder.unpack(body))
                return
            self._obey(kind, body, fds)
            self._busy = False

    def _obey(self, kind: Kind, body: bytes, fds: tuple[int, ...]) -> None:
        if kind is Kind.SETUP:
            document, plan_bytes = ipc.unpack_json(body)
            plan = training_pb2.JobPlan.FromString(plan_bytes)
            arena = self._machines.arenas[fds[0]]
            self._machines.demand_wanted(JobSpec.FromString(plan.spec), self._worker)
            self._machines.demand_version(plan, self._worker)
            # Whatever the job wants, this machine computes as it does.
            shape = replace(jobs.shape_of(plan), fingerprint=self._fingerprint)
            self._plans[document["job"]] = (shape, plan, arena)
            self._scratch[document["job"]] = Scratch(arena.element_count, arena.dtype)
            if shape.local_steps:
                self._local[document["job"]] = LocalSteps(plan, jobs.layout_of(shape))
            answer = {"job": document["job"], "error": "", "traceback": "", "device": ""}
            self._say(Kind.SETUP_DONE, ipc.pack_json(answer))
        elif kind is Kind.DESCRIBE:
            document, plan_bytes = ipc.unpack_json(body)
            plan = training_pb2.JobPlan.FromString(plan_bytes)
            bad = jobs.shape_of(plan).bad
            if bad == "endless":
                return  # until it is killed
            described = coordination_service_pb2.JobDescribed(
                job_id=plan.job_id,
                layout=jobs.layout_of(jobs.shape_of(plan)),
                evaluation_sums=jobs.SUMS if plan.evaluation_shards else (),
                leaf_sha256=self._machines.said_leaf_of(self._worker, jobs.shape_of(plan).parts),
            )
            if bad == "empty":
                described.layout.element_count = 0
            if bad == "undescribed":
                described.failure.code, described.failure.message = "BROKEN_MODEL", "it is broken"
            reply = ipc.pack_json({"job": document["job"]}, described.SerializeToString())
            self._say(Kind.DESCRIBED, reply)
        elif kind is Kind.DROP:
            job = ipc.unpack_json(body)[0]["job"]
            self._plans.pop(job, None)
            self._scratch.pop(job, None)
            self._local.pop(job, None)
        elif kind is Kind.FINGERPRINT:
            found = {"fingerprint": self._fingerprint, "error": ""}
            self._say(Kind.FINGERPRINTED, ipc.pack_json(found))

    def _begin(self, order: ipc.RunOrder) -> None:
        if self._machines.odd:
            shape, plan, _ = self._plans[order.job]
            if not shape.tolerant:
                self._machines.demand_same_leaf(plan.job_id, self._worker)
        self.page.task, self.page.step = order.task, order.version
        self._parts(order, 0)

    def _parts(self, order: ipc.RunOrder, index: int) -> None:
        """Run one part after another, then say that the task has ended."""
        if index == len(order.parts):
            self._over(order)
            return
        first, span, _ = order.parts[index]
        width = self._width(order)
        shards = [s for s in range(first, min(first + span, width)) if s not in order.absent]
        self._leaves(order, index, shards, {}, [])

    def _leaves(
        self,
        order: ipc.RunOrder,
        index: int,
        shards: list[int],
        done: dict[int, tuple[Any, int, float]],
        seconds: list[float],
    ) -> None:
        if self._dead:
            return
        if not shards:
            self._part_done(order, index, done, seconds)
            self._parts(order, index + 1)
            return
        if self.page.cancelled_task == order.task:
            self._over(order)
            return
        self.page.shard = shards[0]
        if self._machines.strikes("hung", self._worker, self._leaf(order, shards[0])):
            return  # until it is killed
        kind = self._what_is_wrong(order, shards[0])
        if kind == LeafFailed.KIND_CRASHED:
            self._crash(order)
            return
        if kind != LeafFailed.KIND_UNSPECIFIED:
            self._part_failed(order, index, shards[0], kind)
            self._parts(order, index + 1)
            return
        leaf_s = self._machines.leaf_s(self._worker)

        def ends() -> None:
            if self._dead:
                return
            computed = done[shards[0]] = self._compute(order, index, shards[0])
            if order.states and not all_finite(computed[0]):
                # Nobody wants it any more, and what it reads is used for something else already.
                self._part_failed(order, index, shards[0], LeafFailed.KIND_NON_FINITE)
                self._parts(order, index + 1)
                return
            seconds.append(leaf_s)
            self.page.shard = -1
            self.page.leaves += 1
            self._leaves(order, index, shards[1:], done, seconds)

        self._loop.call_later(leaf_s, ends)

    def _leaf(self, order: ipc.RunOrder, shard: int) -> tuple[str, int, int, int]:
        return self._plans[order.job][1].job_id, order.action, order.version, shard

    def _what_is_wrong(self, order: ipc.RunOrder, shard: int) -> LeafFailed.Kind.ValueType:
        """What makes this leaf fail; unspecified: nothing."""
        if order.action != GoRecord.ACTION_TRAIN:
            return LeafFailed.KIND_UNSPECIFIED
        machines, (shape, plan, _) = self._machines, self._plans[order.job]
        if machines.strikes("bad", self._worker, self._leaf(order, shard)):
            machines.bad.discard(self._worker)
            return LeafFailed.KIND_NON_FINITE
        if not shape.bad or not jobs.is_bad(shape.bad, shard, order.version):
            return LeafFailed.KIND_UNSPECIFIED
        if shape.bad == "chatty":
            self._chat(order)
        if shape.bad in ("chatty", "overflow"):
            return LeafFailed.KIND_UNSPECIFIED  # the leaf itself is good, or finite at least
        if shape.bad == "deadly":
            machines.deadly[plan.job_id] += 1
            if machines.deadly[plan.job_id] <= DEADLY_TIMES:
                machines.end_leaf_server(self._worker)
            return LeafFailed.KIND_UNSPECIFIED
        if shape.bad == "crash":
            first = plan.job_id not in machines.crashed
            machines.crashed.add(plan.job_id)
            return LeafFailed.KIND_CRASHED if first else LeafFailed.KIND_UNSPECIFIED
        raises = shape.bad == "poison"
        return LeafFailed.KIND_RAISED if raises else LeafFailed.KIND_NON_FINITE

    def _chat(self, order: ipc.RunOrder) -> None:
        """More lines than anybody wants, the mark that begins a context, and a line without end."""
        context = f"\x1e{order.job} {order.version} {self.page.shard}\n".encode()
        self._on_log(self, "info", context + b"again\n" * CHAT_LINES + b"\x1ea mark\n")
        self._on_log(self, "info", b"x" * (LINE_LIMIT_BYTES + 1))

    def _crash(self, order: ipc.RunOrder) -> None:
        """The process ends in the middle of a leaf, and of a line."""
        self._dead = True
        context = f"\x1e{order.job} {order.version} {self.page.shard}\n"
        self._on_log(self, "error", (context + "about to crash\nand in the middle of").encode())
        self._loop.call_later(0.001, self._on_exit, self, 1)

    def _compute(self, order: ipc.RunOrder, index: int, shard: int) -> tuple[Any, int, float]:
        shape = self._plans[order.job][0]
        inner = self._state_of(order, index).inner(shard)
        if self._lies(shape, order, shard):
            self._machines.lies += 1
            values, count, loss = self._true(shape, order, shard, inner)
            factor = 1.5
            if self._machines.unequal:
                factor += self._machines.liars[self._worker]
            return values * values.dtype.type(factor), count, loss
        return self._true(shape, order, shard, inner)

    def _state_of(self, order: ipc.RunOrder, index: int) -> NodeState:
        _, plan, arena = self._plans[order.job]
        first, span, _ = order.parts[index]
        local = self._local.get(order.job)
        names = local.state_names if local is not None and order.states else ()
        buffers = order.states[index] if order.states else ()
        return NodeState(arena, plan, Node(first, span), buffers, names)

    def _lies(self, shape: jobs.Shape, order: ipc.RunOrder, shard: int) -> bool:
        """Whether this worker lies about a leaf, as it may where copies outvote it."""
        number = self._machines.liars.get(self._worker)
        if number is None or not shape.verified:
            return False
        unequal = self._machines.unequal
        if shape.parts == "audit":  # nobody looks at everything, but what all begin with
            return unequal and order.action == GoRecord.ACTION_INITIALISE
        return (order.version + shard) % LIARS == (0 if unequal else number)

    def _true(
        self, shape: jobs.Shape, order: ipc.RunOrder, shard: int, inner: dict[str, NDArray[Any]]
    ) -> tuple[Any, int, float]:
        plan, arena = self._plans[order.job][1:]
        if order.action == GoRecord.ACTION_INITIALISE:
            return jobs.initial(shape), 0, 0.0
        if order.action == GoRecord.ACTION_EVALUATE:
            first, stop = (
                edge * plan.evaluation_rows // plan.evaluation_shards for edge in (shard, shard + 1)
            )
            step = order.version // (plan.shards if plan.asynchronous else shape.rounds)
            sums = jobs.evaluation_sums(shard, jobs.quality(shape, step))
            return np.array(sums), stop - first, 0.0
        out = np.empty(shape.elements, shape.dtype)
        parameters = arena.array(order.parameters)
        if shape.local_steps:
            model: Any = jobs.SimulatedModel(shape)
            outcome = self._local[order.job].run(
                model, parameters, order.version, self._batches(shape, shard), out, inner
            )
            return out, outcome.count, outcome.loss_sum
        if shape.updating:
            return (out, *jobs.updated(shape, shard, order.version, parameters, out))
        count = jobs.examples(shape, shard, order.version)
        jobs.gradient(shape, shard, order.version, parameters, out)
        if shape.bad == "overflow" and jobs.is_bad(shape.bad, shard, order.version):
            out[:] = np.finfo(out.dtype).max
        return out, count, 0.0 if shape.private else jobs.loss(shard, order.version)

    def _batches(self, shape: jobs.Shape, shard: int) -> Callable[[int], Any]:
        return lambda step: jobs.batch_of(shape, shard, step)

    def _part_done(
        self,
        order: ipc.RunOrder,
        index: int,
        done: dict[int, tuple[Any, int, float]],
        seconds: list[float],
    ) -> None:
        arena = self._plans[order.job][2]
        first, span, buffer = order.parts[index]
        initialises = order.action == GoRecord.ACTION_INITIALISE
        evaluates = order.action == GoRecord.ACTION_EVALUATE

        def leaf(shard: int, out: NDArray[Any]) -> Sums:
            if shard not in done:
                return Sums(0, 0.0, 0)
            values, count, loss = done[shard]
            out[:] = values
            return Sums(count, loss, 1 if count or initialises else 0)

        out = np.zeros(len(jobs.SUMS)) if evaluates else arena.array(buffer)
        scratch = Scratch(len(out), out.dtype) if evaluates else self._scratch[order.job]
        with np.errstate(over="ignore"):
            total = reduce_node(Node(first, span), self._width(order), leaf, out, scratch)
        shape = self._plans[order.job][0]
        codec = jobs.up_codec(shape.parts, shape.dtype)
        if codec is not None and order.action == GoRecord.ACTION_TRAIN:
            state = self._state_of(order, index)
            with np.errstate(invalid="ignore"):
                left_out = state.add_left_out(out, present=total.mask != 0)
            if total.mask and not all_finite(out):
                # As of a leaf: what it reads of a task that is cancelled is something else by now.
                self._part_failed(order, index, first, LeafFailed.KIND_NON_FINITE)
                return
            if total.mask:
                compress_in_place(
                    codec, out, arena.raw(buffer), Key(first, order.version), left_out
                )
        sums = tuple(out.tolist()) if evaluates else ()
        count = 0 if initialises else total.count
        answer = ipc.PartDone(
            order.task, index, count, total.loss, total.mask, sums, tuple(seconds)
        )
        self._say(Kind.PART_DONE, answer.pack())

    def _part_failed(
        self, order: ipc.RunOrder, index: int, shard: int, kind: LeafFailed.Kind.ValueType
    ) -> None:
        raises = kind == LeafFailed.KIND_RAISED
        failure = {
            "task": order.task,
            "index": index,
            "shard": shard,
            "kind": int(kind),
            "reason": "",
            "message": "ValueError" if raises else "the gradient of this leaf is not finite",
            "traceback": "",
            "rows": (8 * shard, 8) if raises else (0, 0),
            "seconds": 0.0,
        }
        self.page.shard = -1
        self._say(Kind.PART_FAILED, ipc.pack_json(failure))

    def _over(self, order: ipc.RunOrder) -> None:
        self.page.task, self.page.shard = 0, -1
        self._say(Kind.TASK_ENDED, ipc.pack_ended(order.task))
        self._next()

    def _width(self, order: ipc.RunOrder) -> int:
        plan = self._plans[order.job][1]
        if order.action == GoRecord.ACTION_INITIALISE:
            return 1
        return plan.evaluation_shards if order.action == GoRecord.ACTION_EVALUATE else plan.shards


class CachedFile:
    """A blob in a worker's cache, as a path that can be read."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.name = "file"

    def read_bytes(self) -> bytes:
        return self._content


class Pinned:
    """Stands in for `worker.cache.Pinned`."""

    def __init__(self, digest: str, content: bytes) -> None:
        self.digest = digest
        self.path = CachedFile(content)

    def release(self) -> None:
        pass


class Cache:
    """Stands in for `worker.cache.BlobCache`; what is cached outlives the worker."""

    limit_bytes = 1 << 30
    writable = True

    def __init__(self, machines: Machines, download: Callable[[str, Any], Any]) -> None:
        self._machines = machines
        self._worker = machines.world.loop.current.name
        self._download = download

    async def get(self, digest: str, size_bytes: int | None = None) -> Pinned:
        files = self._machines.files
        while (self._worker, digest) not in files:
            await self._download(digest, PurePosixPath(f"/{self._worker}/{digest}"))
        return Pinned(digest, files[self._worker, digest])

    def prefetch(self, digest: str, size_bytes: int | None = None) -> None:
        pass

    def prefetch_later(self, digest: str, size_bytes: int) -> None:
        pass

    async def close(self) -> None:
        pass
