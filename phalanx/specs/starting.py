"""A job that starts with the parameters of a model: they must be those that its own model has.

Of the file with them only the head is read: its length, then names and shapes as JSON
(safetensors). Which columns they belong to is in the model's description.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from phalanx.data.choice import RawColumns
from phalanx.data.model_files import DESCRIPTION_FILE
from phalanx.errors import InvalidArgument, Violation
from phalanx.specs import catalog
from phalanx.v1 import dataset_service_pb2, job_spec_pb2, model_service_pb2

MISFIT = "START_MODEL_MISFIT"
LENGTH_BYTES = 8
HEADER_LIMIT_BYTES = 16 * 1024 * 1024

_FIELD = "train.start.model"
_NAMES_SHOWN = 10

Shapes = Mapping[str, Sequence[int]]


def known_shapes(spec: job_spec_pb2.JobSpec, dataset: dataset_service_pb2.Dataset) -> Shapes:
    """Return the tensors of a resolved job's model; none for user code, which workers build."""
    return catalog.tensor_shapes(spec.train.model, dataset.features, len(dataset.classes))


def header_bytes(first: bytes) -> int:
    """Return how long the header is, given the first `LENGTH_BYTES`. Raises InvalidArgument."""
    size = int.from_bytes(first, "little")
    if len(first) != LENGTH_BYTES or not 0 < size <= HEADER_LIMIT_BYTES:
        raise _refused("holds no parameters that can be read: it is no safetensors file")
    return size


def stored_shapes(header: bytes) -> Shapes:
    """Return the shapes of a file's tensors by name. Raises InvalidArgument."""
    try:
        tensors = json.loads(header)
        return {
            name: [int(size) for size in tensor["shape"]]
            for name, tensor in tensors.items()
            if name != "__metadata__"
        }
    except (
        *(ValueError, KeyError, TypeError, AttributeError, RecursionError),
        OverflowError,  # a size of Infinity, which Python's JSON takes for a number
    ) as error:
        raise _refused(f"holds no parameters that can be read: {error!r}") from error


def shapes_in_file(path: Path) -> Shapes:
    """Return the shapes of the tensors in a file by name. Raises InvalidArgument."""
    with path.open("rb") as file:
        return stored_shapes(file.read(header_bytes(file.read(LENGTH_BYTES))))


def check_shapes(stored: Shapes, wanted: Shapes) -> None:
    """Raise InvalidArgument unless a model has the tensors, no more and no less, that a job needs.

    Their order and dtype may differ.
    """
    for name, shape in wanted.items():
        found = stored.get(name)
        if found is None:
            found_text = f"has no tensor {name!r}"
        elif list(found) != list(shape):
            found_text = f"has {name!r} in the shape {list(found)}"
        else:
            continue
        raise _misfit(f"it {found_text} and the model of this job needs {list(shape)}")
    for name, shape in stored.items():
        if name not in wanted:
            raise _misfit(f"it has a tensor {name!r} {list(shape)}, and the model of this job none")


@dataclass(frozen=True)
class TrainedOn:
    """The raw columns that a model sees, in order; ``names`` is empty where they have none.

    ``chosen`` says whether a job chose them among those of its data set.
    """

    names: tuple[str, ...] = ()
    chosen: bool = False

    def needs_columns(self, data: job_spec_pb2.Data) -> bool:
        """Say whether it takes the columns of a job's data set to compare, chosen or not."""
        return bool(self.names) and (self.chosen or bool(data.features))


def description_digest(model: model_service_pb2.ModelVersion) -> str:
    """Return the digest of a model's description; empty where it has none."""
    return next((each.digest for each in model.files if each.path == DESCRIPTION_FILE), "")


def trained_on(description: bytes) -> TrainedOn:
    """Return what a model's description says of its columns; nothing where it is none."""
    try:
        document = json.loads(description)
        names = tuple(str(column["name"]) for column in document["columns"])
        return TrainedOn(names, document.get("chosen_from") is not None)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return TrainedOn()


def check_columns(model: TrainedOn, data: job_spec_pb2.Data, columns: RawColumns | None) -> None:
    """Raise InvalidArgument where a model saw other columns than a job has, or in another order.

    Only where the model or the job chose some: equal shapes do not tell them apart. Columns without
    names go by their places, of which nothing is known in other data unless they were chosen.
    """
    if columns is None or not model.needs_columns(data):
        return
    own = tuple(data.features) or tuple(column.name for column in columns.named)
    if not own or own == model.names:
        return
    raise _refused(
        f"does not fit: it was trained on the columns {_shown(model.names)}, and this job is on "
        f"{_shown(own)}; choose the same in data.features, or start from another model"
    )


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if names[_NAMES_SHOWN:] else ""
    return ", ".join(name[:60] for name in names[:_NAMES_SHOWN]) + more


def _misfit(text: str) -> InvalidArgument:
    return _refused(f"does not fit: {text}; start from a model of the same kind and size")


def _refused(message: str) -> InvalidArgument:
    return InvalidArgument(
        f"{_FIELD} {message}", reason=MISFIT, violations=[Violation(_FIELD, message)]
    )
