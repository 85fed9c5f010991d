"""Programs of tasks in this very process: the tasks in the order of their numbers."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from phalanx.programs.base import Beside, Graph, ModelParts, Outcome, Piece
from phalanx.sdk.in_process_tasks import IN_PROCESS, TaskFailed, run_task
from phalanx.tasks import ATTEMPTS, TASKS_DONE
from phalanx.v1.job_pb2 import Result
from phalanx.v1.task_service_pb2 import StoredValue, TaskResult
from phalanx.v1.training_pb2 import JobPlan

if TYPE_CHECKING:
    from phalanx.training.local import TrainedModel

BlobPath = Callable[[str], Path]
_DIGEST_LENGTH = 64


@dataclass(frozen=True)
class Blobs:
    """Where results are kept: `path` of a blob, `put` keeps bytes and returns their digest."""

    path: BlobPath
    put: Callable[[bytes], str]


def run_program(
    plan: JobPlan,
    blobs: Blobs,
    results: dict[int, TaskResult],
    on_result: Callable[[], None],
    code_dir: Path | None = None,
    *,
    goes_on: bool = True,
) -> Outcome:
    """Run what has no result yet and add it to `results`; `on_result` is called after each.

    Without `goes_on` each task does all of its work itself, whatever others have kept for it.
    What `on_result` raises ends it. Raises TaskFailed, and whatever loading the program raises.
    """
    from phalanx.programs import graph_of
    from phalanx.programs.data import JobFiles
    from phalanx.programs.work import ProgramWork

    model = {name: blobs.path(digest) for name, digest in plan.model_files.items()}
    files = JobFiles(blobs.path(plan.manifest_digest), code_dir, model)
    with tempfile.TemporaryDirectory(prefix="phalanx-kept-") as name:
        kept = _Kept(graph_of(plan), Path(name))
        work = ProgramWork(
            plan, files, lambda digest, _size: kept.path(digest) or blobs.path(digest)
        )
        work.describe()
        graph, values = graph_of(plan), {task: each.stored for task, each in results.items()}
        for task, needs in enumerate(graph.needs):
            if task in results:
                continue
            passed = graph.passed(task, values)
            if passed is not None:
                result = TaskResult(task=task, worker_id=IN_PROCESS, stored=passed)
            else:
                inputs = [values[needed] for needed in needs]
                result, beside = _run(work.call, task, inputs + kept.inputs(task), blobs)
                if goes_on:
                    kept.take(task, beside)
            results[task], values[task] = result, result.stored
            if result.HasField("failure"):
                raise TaskFailed(result.failure)
            on_result()
    return Outcome.from_json(blobs.path(results[len(results) - 1].stored.digest).read_bytes())


class _Kept:
    """What tasks have kept for others, in files of a folder that is there as long as they run."""

    def __init__(self, graph: Graph, folder: Path) -> None:
        self._folder = folder
        #: Tasks that get the result of each, in the order of their numbers.
        self._users: dict[int, list[int]] = {}
        for user, needs in enumerate(graph.needs):
            for needed in dict.fromkeys(needs):
                self._users.setdefault(needed, []).append(user)
        self._earlier: dict[int, StoredValue] = {}

    def take(self, task: int, beside: Beside) -> None:
        """A task has run."""
        if beside.kept:
            path = self._folder / str(task)
            try:
                path.write_bytes(beside.kept)
            except OSError:  # a full disk, say: others do without
                path.unlink(missing_ok=True)
        for user, earlier in zip(self._users.get(task, ()), beside.earlier, strict=False):
            path = self._folder / str(earlier)
            if path.exists():
                size_bytes = path.stat().st_size
                self._earlier[user] = StoredValue(digest=str(earlier), size_bytes=size_bytes)

    def inputs(self, task: int) -> list[StoredValue]:
        """Return what a task may go on from, if there is something."""
        return [self._earlier[task]] if task in self._earlier else []

    def path(self, name: str) -> Path | None:
        """Return where something is kept; None for what is a blob."""
        return self._folder / name if name.isdecimal() and len(name) < _DIGEST_LENGTH else None


def _run(
    call: Callable[[int, Sequence[StoredValue]], tuple[bytes, Beside]],
    task: int,
    inputs: Sequence[StoredValue],
    blobs: Blobs,
) -> tuple[TaskResult, Beside]:
    left = Beside()

    def store(number: int, result: TaskResult) -> None:
        nonlocal left
        value, left = call(number, inputs)
        stored = StoredValue(digest=blobs.put(value), size_bytes=len(value))
        result.stored.CopyFrom(stored)

    return run_task(store, task, ATTEMPTS), left


def vector_of(model: ModelParts, path: BlobPath) -> tuple[bytes, str]:
    """Return the flat vector of a model, and its SHA-256."""

    def read(piece: Piece) -> bytes:
        with path(piece.digest).open("rb") as file:
            file.seek(piece.offset)
            return file.read(piece.length)

    vector = model.vector(read)
    return vector, hashlib.sha256(vector).hexdigest()


def result_of(plan: JobPlan, outcome: Outcome, tasks: int) -> Result:
    """Return what a job that has ended tells, but for its model."""
    result = Result(steps=tasks, metrics=outcome.metrics, bit_identical=plan.bitwise)
    for name, file in sorted(outcome.files.items()):
        result.files.add(name=name, digest=file.digest, size_bytes=file.size_bytes)
    return result


def trained_of(outcome: Outcome, blobs: Blobs, tasks: int) -> TrainedModel | None:
    """Return the model that a program left; None where it left none."""
    import numpy as np

    from phalanx.training.local import TrainedModel

    if outcome.model is None:
        return None
    layout = outcome.model.layout
    vector, sha256 = vector_of(outcome.model, blobs.path)
    return TrainedModel(
        layout=layout,
        parameters=np.frombuffer(vector, np.dtype(layout.dtype).newbyteorder("<")),
        parameters_sha256=sha256,
        steps=tasks,
        examples=0,
        reason=TASKS_DONE,
        metrics=dict(outcome.metrics),
        points=[],
    )
