"""What a program of tasks is, and what it leaves."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from google.protobuf.json_format import MessageToDict, ParseDict, ParseError

from phalanx.errors import DataLoss, Violation
from phalanx.v1.dataset_service_pb2 import Dataset
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.task_service_pb2 import StoredValue
from phalanx.v1.training_pb2 import JobPlan, Layout

RESULT_BYTES_MAX = 1000 * 1024 * 1024
"""A leaf process hands a result to its worker in one message, which both hold in memory."""

OUTCOME_BYTES_MAX = 4 * 1024 * 1024
"""Control reads it into memory, and writes what it tells into one record of its journal."""

DIMENSIONS_MAX = 8


@dataclass(frozen=True)
class Graph:
    """The tasks of a job, numbered from 0: `needs[task]` are those whose results it gets, in the
    order in which it gets them; all have smaller numbers. The last one's result is the outcome.

    A task of `passing` is passed over where the last of its needs is empty: nobody runs it, and
    its result is that of the first. Of the tasks that are ready those of the highest of `levels`
    are handed out first; without levels all are equal.
    """

    needs: tuple[tuple[int, ...], ...]
    passing: frozenset[int] = frozenset()
    levels: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        """How many tasks there are."""
        return len(self.needs)

    def passed(self, task: int, values: Mapping[int, StoredValue]) -> StoredValue | None:
        """Return the result of a task that is passed over; None: it has to be run. `values` are
        the results of its needs."""
        if task not in self.passing or values[self.needs[task][-1]].size_bytes:
            return None
        return values[self.needs[task][0]]

    def passed_over(self, values: Mapping[int, StoredValue]) -> dict[int, StoredValue]:
        """Return the results of all tasks that are passed over, of those that were run."""
        known, found = dict(values), {}
        for task in sorted(self.passing - known.keys()):
            if all(needed in known for needed in self.needs[task]):
                value = self.passed(task, known)
                if value is not None:
                    known[task] = found[task] = value
        return found


@dataclass
class Beside:
    """What a task leaves for others beside its result, which must not depend on it.

    Attributes:
        kept: what other tasks may go on from; empty: nothing. They get it as one input more than
            the graph says, and have to do without where it is gone.
        earlier: for each task that gets this result, in the order of their numbers: which task it
            goes on from; less than 0: from none.
    """

    kept: bytes = b""
    earlier: tuple[int, ...] = ()


@dataclass(frozen=True)
class Piece:
    """Bytes of a model's vector: part of a stored result."""

    digest: str
    offset: int
    length: int


@dataclass(frozen=True)
class ModelParts:
    """A model that a program leaves: its layout, and where its flat vector lies, in order.

    `spec` is the job that it is the model of, where that is another one than the program itself.
    """

    layout: Layout
    pieces: tuple[Piece, ...]
    spec: JobSpec | None = None

    def vector(self, read: Callable[[Piece], bytes]) -> bytes:
        """Return the flat vector; `read` returns a part of a result."""
        return b"".join(map(read, self.pieces))

    def spec_of(self, job: JobSpec) -> JobSpec | None:
        """Return the spec that the model is described with; None: that of its job. Whatever a task
        has written there, the model gets no other code and no other place than its job has."""
        if self.spec is None:
            return None
        spec = JobSpec()
        spec.CopyFrom(self.spec)
        spec.namespace = job.namespace
        spec.code.CopyFrom(job.code)
        spec.output.CopyFrom(job.output)
        return spec


@dataclass(frozen=True)
class Outcome:
    """What a program leaves. Each file is the whole result of a task, and so kept with the job."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    model: ModelParts | None = None
    files: Mapping[str, StoredValue] = field(default_factory=dict)

    def to_json(self) -> bytes:
        """The result of the last task; equal outcomes give equal bytes."""
        document: dict[str, Any] = {
            "metrics": dict(self.metrics),
            "files": {name: [each.digest, each.size_bytes] for name, each in self.files.items()},
        }
        if self.model is not None:
            layout = MessageToDict(self.model.layout, preserving_proto_field_name=True)
            pieces = [[each.digest, each.offset, each.length] for each in self.model.pieces]
            document["model"] = {"layout": layout, "pieces": pieces}
            if self.model.spec is not None:
                document["model"]["spec"] = MessageToDict(
                    self.model.spec, preserving_proto_field_name=True
                )
        text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return text.encode()

    @staticmethod
    def from_json(data: bytes) -> Outcome:
        """Read what `to_json` wrote. Raises DataLoss for anything else: a process wrote it in which
        code of users may run."""
        if len(data) > OUTCOME_BYTES_MAX:
            text = f"the outcome of the job has {len(data)} bytes, more than {OUTCOME_BYTES_MAX}"
            raise DataLoss(text, reason="OUTCOME_UNREADABLE")
        try:
            document = json.loads(data)
            model = None
            if "model" in document:
                layout = ParseDict(document["model"]["layout"], Layout())
                if any(len(tensor.shape) > DIMENSIONS_MAX for tensor in layout.tensors):
                    raise ValueError(f"a tensor has more than {DIMENSIONS_MAX} dimensions")
                pieces = tuple(_piece_from(each) for each in document["model"]["pieces"])
                spec = None
                if "spec" in document["model"]:
                    spec = ParseDict(document["model"]["spec"], JobSpec())
                model = ModelParts(layout, pieces, spec)
            return Outcome(
                metrics={_name(name): float(each) for name, each in document["metrics"].items()},
                model=model,
                files={
                    _name(name): StoredValue(digest=digest, size_bytes=_place(size))
                    for name, (digest, size) in document["files"].items()
                },
            )
        except _UNREADABLE as error:
            text = f"the outcome of the job cannot be read: {error!r:.200}"
            raise DataLoss(text, reason="OUTCOME_UNREADABLE") from error


_UNREADABLE = (
    ArithmeticError,  # a number that no float or integer has room for
    AttributeError,
    KeyError,
    ParseError,
    RecursionError,  # lists within lists within lists
    TypeError,
    ValueError,
)


class Program(ABC):
    """One choice of `JobSpec.program`. See `phalanx.programs` on how to write one."""

    name: ClassVar[str]
    leaves_model: ClassVar[bool] = False
    """Whether its outcome has a model; else `output` is refused."""

    @abstractmethod
    def violations(self, spec: JobSpec) -> Iterator[Violation]:
        """Yield what is wrong with a spec whatever its data; of raw as well as resolved ones."""

    @abstractmethod
    def violations_against(self, spec: JobSpec, dataset: Dataset) -> Iterator[Violation]:
        """Yield what is wrong between a resolved spec and its data set."""

    @abstractmethod
    def resolve(self, spec: JobSpec, dataset: Dataset) -> None:
        """Write out the program's defaults, before those of `data` are."""

    @abstractmethod
    def graph(self, plan: JobPlan) -> Graph:
        """Return the tasks of a job; a pure function of its plan."""

    def warnings(self, spec: JobSpec, dataset: Dataset) -> list[str]:
        """Return what people should know of a job before it runs."""
        return []

    def worker_bytes(self, spec: JobSpec, dataset: Dataset) -> int:
        """Return about how much memory a task needs; as a rule the rows of the split, twice."""
        rows = dataset.rows.get(spec.data.split, 0)
        if dataset.format == "csr":
            return 2 * stored_bytes(dataset, rows)
        return 2 * 4 * rows * dataset.features


def stored_bytes(dataset: Dataset, rows: int) -> int:
    """Return what so many rows take of what a data set takes, which of sparse ones nobody counts
    row by row."""
    return dataset.size_bytes * rows // max(1, sum(dataset.rows.values()))


def _piece_from(document: list[Any]) -> Piece:
    digest, offset, length = document
    return Piece(digest=_name(digest), offset=_place(offset), length=_place(length))


def _name(text: Any) -> str:
    """Return what a message has room for. Raises ValueError for half of a pair of surrogates."""
    name = str(text)
    name.encode()
    return name


def _place(number: Any) -> int:
    place = int(number)
    if not 0 <= place < 2**63:
        raise ValueError(f"no place in a file: {place}")
    return place
