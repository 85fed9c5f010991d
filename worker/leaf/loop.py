"""The life of a leaf process: take an order, run its leaves, answer; nothing else.

Everything that a job's code can do wrong is turned into a message that names the shard; what
cannot be caught (a crash, a hang, a kill) is read by the session from the progress page.
"""

from __future__ import annotations

import time
import traceback
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from phalanx.calls import CallWork
from phalanx.data.manifest import ChunkInfo
from phalanx.errors import DataLoss, PhalanxError
from phalanx.messages import known
from phalanx.model_failures import reason_of
from phalanx.models.base import DeviceLost
from phalanx.programs.data import BlobUnavailable, JobFiles
from phalanx.programs.work import ProgramWork
from phalanx.reduction import Node, all_finite
from phalanx.tasks import is_program, runs_tasks
from phalanx.v1 import coordination_service_pb2, training_pb2
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.task_service_pb2 import StoredValue
from worker import ipc
from worker.ipc import BlockingConnection, Kind
from worker.leaf import output
from worker.leaf.reduce import LeafFunction, Scratch, Sums, reduce_node
from worker.leaf.states import NodeState
from worker.leaf.work import JobWork, Paths
from worker.memory import Arena, ProgressPage

GoRecord = training_pb2.GoRecord
LeafFailed = coordination_service_pb2.LeafFailed

Calls = CallWork | ProgramWork
Work = JobWork | Calls

TRACEBACK_LIMIT = 16_384
_MESSAGE_LIMIT = 2_048


class DataUnavailable(BlobUnavailable):
    """The session could not provide a chunk."""


class _Cancelled(Exception):
    """The session does not want the rest of the task."""


class _NotFinite(Exception):
    """A leaf's payload or loss is NaN or infinite."""


class LeafLoop:
    """Serves one connection until it closes."""

    def __init__(self, connection: BlockingConnection, page: ProgressPage) -> None:
        self._connection = connection
        self._page = page
        self._jobs: dict[int, Work | Exception] = {}
        self._job = -1
        #: Whether what leaves compute on has failed for good.
        self._lost = False
        #: Of the part that is computed.
        self._waited_s = 0.0
        #: Leaves (job, shard, step) whose rows can be gathered while there is nothing to do.
        self._later: deque[tuple[JobWork, int, int]] = deque()

    def serve(self) -> None:
        """Handle messages until this process is of no use any more; raises `ConnectionClosed` when
        the session process is gone."""
        output.redirect(lambda: (self._job, self._page.step, self._page.shard))
        self._connection.send(Kind.READY)
        while not self._lost:
            while self._later and not self._connection.has_message():
                self._read_ahead()
            message = self._connection.receive()
            match message.kind:
                case Kind.RUN:
                    self._run(ipc.RunOrder.unpack(message.body))
                case Kind.SETUP:
                    self._set_up(message)
                case Kind.DROP:
                    self._drop(message)
                case Kind.DESCRIBE:
                    self._describe(message)
                case Kind.FINGERPRINT:
                    self._fingerprint()
                case Kind.FETCHED:
                    pass  # An answer to a task that was given up.

    # Orders

    def _set_up(self, message: ipc.Message) -> None:
        document, plan_bytes = ipc.unpack_json(message.body)
        job: int = document["job"]
        self._job = job
        plan = training_pb2.JobPlan.FromString(plan_bytes)
        answer: dict[str, Any] = {"job": job, "error": "", "traceback": "", "device": ""}
        dtype = np.dtype(plan.layout.dtype or "float32")
        calls = self._calls(plan, document)
        arena = Arena.attach(message.fds[0], plan.layout.element_count, dtype)
        try:
            if calls is not None:
                arena.close()
                self._jobs[job] = calls
                calls.describe()
            else:
                work = JobWork(plan, _paths(document), self._fetch, arena, document["fits"])
                self._jobs[job] = work
                if work.model.layout != known(plan.layout):
                    text = "the model built here has another layout than the job; see its code"
                    raise DataLoss(text)
                answer["device"] = work.device
        except Exception as error:  # noqa: BLE001
            self._note(error)
            # Told again by every leaf, so that the failure counts as that of its shard.
            self._jobs[job] = error
            answer |= {"error": _message(error), "traceback": _traceback(error)}
        output.flush()
        self._connection.send(Kind.SETUP_DONE, ipc.pack_json(answer))

    def _calls(self, plan: training_pb2.JobPlan, document: dict[str, Any]) -> Calls | None:
        """What runs the tasks of a job; None for one that goes step by step."""
        spec, paths = JobSpec.FromString(plan.spec), _paths(document)
        if is_program(spec):
            model = {name: Path(path) for name, path in document["model_files"].items()}
            files = JobFiles(paths.manifest, paths.code, model)
            return ProgramWork(plan, files, self._fetch_blob)
        return CallWork(plan, paths.code) if runs_tasks(spec) else None

    def _drop(self, message: ipc.Message) -> None:
        document, _ = ipc.unpack_json(message.body)
        self._later.clear()
        work = self._jobs.pop(document["job"], None)
        if work is not None and not isinstance(work, Exception):
            work.close()

    def _describe(self, message: ipc.Message) -> None:
        document, plan_bytes = ipc.unpack_json(message.body)
        self._job = document["job"]
        plan = training_pb2.JobPlan.FromString(plan_bytes)
        answer = coordination_service_pb2.JobDescribed(job_id=plan.job_id)
        try:
            calls = self._calls(plan, document)
            if calls is not None:
                answer.layout.CopyFrom(calls.describe())
            else:
                described = JobWork(plan, _paths(document), self._fetch).describe()
                answer.layout.CopyFrom(described.layout)
                answer.evaluation_sums.extend(described.evaluation_sums)
                answer.leaf_sha256 = described.leaf_sha256
        except BaseException as error:  # noqa: BLE001 - user code raises what it likes
            self._note(error)
            answer.failure.code = _description_code(plan, error)
            answer.failure.message = _message(error)
            answer.failure.traceback = _traceback(error)
        output.flush()
        reply = ipc.pack_json({"job": document["job"]}, answer.SerializeToString())
        self._connection.send(Kind.DESCRIBED, reply)

    def _fingerprint(self) -> None:
        from phalanx.numeric_fingerprint import compute

        answer = {"fingerprint": "", "error": ""}
        try:
            answer["fingerprint"] = compute()
        except PhalanxError as error:
            answer["error"] = error.message
        self._connection.send(Kind.FINGERPRINTED, ipc.pack_json(answer))

    def _run(self, order: ipc.RunOrder) -> None:
        self._job = order.job
        self._page.begin_task(order.task, order.version)
        try:
            work = self._jobs[order.job]
            if isinstance(work, JobWork) and order.action == GoRecord.ACTION_TRAIN:
                self._look_ahead(work, order)
            for index, (first, span, buffer) in enumerate(order.parts):
                self._run_part(work, order, index, Node(first, span), buffer)
                if self._lost:
                    return  # the end of this process is that of the task
            if isinstance(work, JobWork):
                work.forget_rows()
        except _Cancelled:
            pass
        finally:
            self._page.end_task()
        output.flush()
        self._connection.send(Kind.TASK_ENDED, ipc.pack_ended(order.task))

    def _note(self, error: BaseException) -> None:
        """Serve no more after a failure of the device; who asked gets its answer before."""
        self._lost = self._lost or isinstance(error, DeviceLost)

    # Parts and leaves

    def _run_part(
        self,
        work: Work | Exception,
        order: ipc.RunOrder,
        index: int,
        node: Node,
        buffer: int,
    ) -> None:
        # What fails before the first leaf counts as that of the first shard.
        leaf = _LeafRun(self._page, order, node.first)
        try:
            if isinstance(work, Exception):
                raise work
            if isinstance(work, Calls):
                kind, done = Kind.CALL_DONE, _call(work, order, leaf, index, node.first)
                output.flush()
            else:
                kind = Kind.PART_DONE
                done = self._compute(work, order, leaf, index, node, buffer).pack()
        except _Cancelled:
            raise
        except BaseException as error:  # noqa: BLE001 - user code raises what it likes
            self._note(error)
            seconds = self._page.leaf_seconds(time.monotonic_ns())
            failure = _failure(work, order, index, leaf.shard, error, seconds)
            self._connection.send(Kind.PART_FAILED, failure)
        else:
            last = index == len(order.parts) - 1
            send = self._connection.send_with_next if last else self._connection.send
            send(kind, done)
        finally:
            self._page.no_leaf()

    def _compute(
        self,
        work: JobWork,
        order: ipc.RunOrder,
        leaf: _LeafRun,
        index: int,
        node: Node,
        buffer: int,
    ) -> ipc.PartDone:
        plan = work.plan
        sums: tuple[float, ...] = ()
        self._waited_s = 0.0
        if order.action == GoRecord.ACTION_INITIALISE:
            leaf.timed(node.first, lambda: work.initialise(work.payload(buffer)))
            total = Sums(0, 0.0, 1)
        elif order.action == GoRecord.ACTION_EVALUATE:
            parameters = work.parameters(order.parameters)
            out = np.zeros(len(work.model.evaluation_sums), np.float64)
            scratch = Scratch(len(out), out.dtype)
            run = leaf.evaluation(work, parameters)
            total = reduce_node(node, plan.evaluation_shards, run, out, scratch)
            sums = tuple(out.tolist())
        else:
            parameters = work.parameters(order.parameters)
            state = work.state_of(node, order.states[index] if order.states else ())
            run = leaf.training(work, parameters, frozenset(order.absent), state)
            payload = work.payload(buffer)
            total = reduce_node(node, plan.shards, run, payload, work.scratch)
            left_out = state.add_left_out(payload, present=total.mask != 0)
            if work.up_codec is not None and total.mask:
                if not all_finite(payload):
                    raise _NotFinite("the sum of leaves that are finite is not")
                work.compress(buffer, node.first, order.version, left_out)
        return ipc.PartDone(
            order.task,
            index,
            total.count,
            total.loss,
            total.mask,
            sums,
            tuple(leaf.seconds),
            self._waited_s,
        )

    # Data

    def _look_ahead(self, work: JobWork, order: ipc.RunOrder) -> None:
        """Let the session fetch what the leaves will need while the first of them runs."""
        shards = [
            shard
            for first, span, _ in order.parts
            for shard in range(first, min(first + span, work.plan.shards))
        ]
        self._later.clear()
        if not work.plan.asynchronous:  # there the next leaf is that of any shard
            steps = work.own_steps(order.version + 1)
            self._later.extend((work, shard, step) for shard in shards for step in steps)
        try:
            soon, later = work.chunks_to_prefetch(shards, order.version)
        except Exception:  # noqa: BLE001
            # Only a hint: whatever is wrong is reported by the leaf that meets it.
            return
        if soon or later:
            named = {
                name: [[chunk.digest, chunk.size_bytes] for chunk in chunks]
                for name, chunks in (("soon", soon), ("later", later))
            }
            self._connection.send(Kind.PREFETCH, ipc.pack_json(named))

    def _read_ahead(self) -> None:
        work, shard, step = self._later.popleft()
        try:
            if not work.read_ahead(shard, step):
                self._later.clear()
        except Exception:  # noqa: BLE001
            # Whatever is wrong is reported by the leaf that meets it.
            self._later.clear()

    def _fetch(self, chunk: ChunkInfo) -> Path:
        return self._fetch_blob(chunk.digest, chunk.size_bytes)

    def _fetch_blob(self, digest: str, size_bytes: int) -> Path:
        request = {"digest": digest, "size_bytes": size_bytes}
        started = time.perf_counter()
        self._connection.send(Kind.FETCH, ipc.pack_json(request))
        while True:
            answer, _ = ipc.unpack_json(self._connection.receive_only(Kind.FETCHED).body)
            if answer["digest"] != digest:
                continue
            self._waited_s += time.perf_counter() - started
            if answer.get("cancelled"):
                raise _Cancelled
            if answer["error"]:
                raise DataUnavailable(answer["error"])
            return Path(answer["path"])


class _LeafRun:
    """The leaves of one part: marks them on the progress page and takes their times."""

    def __init__(self, page: ProgressPage, order: ipc.RunOrder, first: int) -> None:
        self.shard = first
        self.seconds: list[float] = []
        self._page = page
        self._order = order

    def timed(self, shard: int, run: Any) -> Any:
        """Run one leaf."""
        if self._page.cancelled_task == self._order.task:
            raise _Cancelled
        self.shard = shard
        self._page.begin_leaf(shard, time.monotonic_ns())
        started = time.perf_counter()
        result = run()
        self.seconds.append(time.perf_counter() - started)
        self._page.end_leaf()
        return result

    def training(
        self, work: JobWork, parameters: Any, absent: frozenset[int], state: NodeState
    ) -> LeafFunction:
        step = self._order.version

        def leaf(shard: int, out: Any) -> Sums:
            if shard in absent:
                return Sums(0, 0.0, 0)
            inner = state.inner(shard)
            outcome = self.timed(shard, lambda: work.train(parameters, shard, step, out, inner))
            if not outcome.finite:
                raise _NotFinite("the gradient or the loss of this leaf is not finite")
            return Sums(outcome.count, outcome.loss_sum, 1 if outcome.count else 0)

        return leaf

    def evaluation(self, work: JobWork, parameters: Any) -> LeafFunction:
        def leaf(shard: int, out: Any) -> Sums:
            outcome, sums = self.timed(shard, lambda: work.evaluate(parameters, shard))
            out[:] = sums
            return Sums(outcome.count, 0.0, 1 if outcome.count else 0)

        return leaf


def _call(work: Calls, order: ipc.RunOrder, leaf: _LeafRun, index: int, task: int) -> bytes:
    """Run one task of a set or a program; return the body of CALL_DONE."""
    if isinstance(work, ProgramWork):
        given = order.inputs[index] if order.inputs else ()
        inputs = [StoredValue(digest=digest, size_bytes=size) for digest, size in given]
        value, beside = leaf.timed(task, lambda: work.call(task, inputs))
        seconds = leaf.seconds[-1]
        return ipc.pack_call(order.task, index, seconds, value, beside.kept, beside.earlier)
    value = leaf.timed(task, lambda: work.call(task))
    return ipc.pack_call(order.task, index, leaf.seconds[-1], value)


def _description_code(plan: training_pb2.JobPlan, error: BaseException) -> str:
    return reason_of(error) or ("JOB_CODE" if plan.code_digests else "JOB_DESCRIPTION")


def _paths(document: dict[str, Any]) -> Paths:
    return Paths(
        manifest=Path(document["manifest"]),
        code=Path(document["code"]) if document["code"] else None,
        start_model=Path(document["start_model"]) if document["start_model"] else None,
    )


def _failure(
    work: Work | Exception,
    order: ipc.RunOrder,
    index: int,
    shard: int,
    error: BaseException,
    seconds: float,
) -> bytes:
    evaluation = order.action == GoRecord.ACTION_EVALUATE
    rows = work.rows_of(shard, evaluation) if isinstance(work, JobWork) else (0, 0)
    return ipc.pack_json(
        {
            "task": order.task,
            "index": index,
            "shard": shard,
            "kind": _kind_of(error),
            "reason": reason_of(error),
            "message": _message(error),
            "traceback": "" if isinstance(error, _NotFinite) else _traceback(error),
            "rows": rows,
            "seconds": seconds,
        }
    )


def _kind_of(error: BaseException) -> int:
    if isinstance(error, MemoryError):
        return int(LeafFailed.KIND_OUT_OF_MEMORY)
    if isinstance(error, _NotFinite):
        return int(LeafFailed.KIND_NON_FINITE)
    if isinstance(error, (DataUnavailable, DataLoss)):
        return int(LeafFailed.KIND_DATA)
    return int(LeafFailed.KIND_RAISED)


def _message(error: BaseException) -> str:
    text = str(error)
    name = type(error).__name__
    if isinstance(error, (_NotFinite, DataUnavailable)):
        return text[:_MESSAGE_LIMIT]
    return (f"{name}: {text}" if text else name)[:_MESSAGE_LIMIT]


def _traceback(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))[-TRACEBACK_LIMIT:]
