"""Programs that take a model which is stored: which they name, and whether it fits their data.

What the model says of itself (its columns, its code) is written into the spec, so that the job
reads and runs just that.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from google.protobuf.json_format import ParseDict, ParseError

from phalanx.data.choice import RawColumns, choose
from phalanx.data.manifest import Column, DatasetManifest, columns_from
from phalanx.errors import DataLoss, InvalidArgument, Violation
from phalanx.needs import gpus_complaint, kind_of, libraries_of_model
from phalanx.programs.model_memory import model_bytes
from phalanx.texts import listed, number_of
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.model_service_pb2 import ModelVersion
from phalanx.v1.training_pb2 import Layout

_SHOWN = 60
_CLASSES_SHOWN = 10


@dataclass(frozen=True)
class Taken:
    """What a model asks of whoever puts rows through it."""

    size_bytes: int = 0
    """About how much memory it takes."""

    libraries: tuple[str, ...] = ()
    """Packages without which it cannot be computed."""


def model_field(spec: JobSpec) -> str:
    """Return the path of the field that names the model; empty where the job takes none."""
    program = spec.WhichOneof("program")
    return f"{program}.model" if program in ("evaluate", "predict") else ""


def model_name(spec: JobSpec) -> str:
    """Return the model that a program takes; empty: none."""
    program = spec.WhichOneof("program")
    return str(getattr(spec, program).model) if program and model_field(spec) else ""


def stored_model(spec: JobSpec) -> str:
    """Return the model that a job refers to, whether it starts from it or puts rows through it."""
    return model_name(spec) or spec.train.start.model


def take_model(
    spec: JobSpec, model: ModelVersion, description: bytes, manifest: DatasetManifest
) -> Taken:
    """Write down which version of its model a job takes, with its columns and its code; return
    what the model asks of workers. None of its code runs here.

    Raises InvalidArgument for a model that does not fit the data set or has no use for the GPUs
    that the job asks for, and DataLoss for a description that cannot be read.
    """
    field, program = model_field(spec), getattr(spec, spec.WhichOneof("program") or "")
    try:
        document = json.loads(description)
        origin = ParseDict(document["spec"], JobSpec(), ignore_unknown_fields=True)
        columns = columns_from(document["columns"])
        layout = ParseDict(document["layout"], Layout())
        taken = Taken(model_bytes(origin, layout), tuple(libraries_of_model(origin)))
        wrong = next(_misfits(spec, document, origin, columns, manifest), "")
    except (ValueError, KeyError, TypeError, AttributeError, ParseError) as error:
        raise DataLoss(
            f"the description of model {model.name} cannot be read: {error!r}"
        ) from error
    if wrong:
        message = f"does not fit: {wrong}"
        raise InvalidArgument(
            f"{field} {message}", reason="MODEL_MISFIT", violations=[Violation(field, message)]
        )
    named = f"{program.model.partition('@')[0]}@{model.version}"
    _check_gpus(spec, origin, named)
    program.model = named
    spec.data.features[:] = origin.data.features
    if origin.code.files or origin.code.wheels:
        spec.code.CopyFrom(origin.code)
    return taken


def _check_gpus(spec: JobSpec, origin: JobSpec, named: str) -> None:
    complaint = gpus_complaint(kind_of(origin), spec.resources.gpus)
    if complaint:
        field, message = "resources.gpus", f"for the model {named}: {complaint}"
        raise InvalidArgument(
            f"{field}: {message}", reason="SPEC_INVALID", violations=[Violation(field, message)]
        )


def _misfits(
    spec: JobSpec,
    document: dict[str, Any],
    origin: JobSpec,
    columns: tuple[Column, ...],
    manifest: DatasetManifest,
) -> Iterator[str]:
    """Yield what of a model does not go with a data set, whose rows are encoded already."""
    whole = RawColumns.of(manifest)
    lacking = [name for name in origin.data.features if whole.position(name) is None]
    if lacking:
        yield f"it takes the column {lacking[0][:_SHOWN]!r}, which the data set does not have"
        return
    seen = choose(manifest, origin.data.features).manifest
    if seen.features != document["features"]:
        needed = number_of(document["features"], "feature")
        yield f"it takes {needed}, and the data set has {seen.features}"
    for own, other in zip(columns, seen.columns, strict=False):
        if _encoding(own) != _encoding(other):
            yield (
                f"the data set encodes its column {other.name[:_SHOWN]!r} otherwise than the one "
                "it was trained on; use `phalanx predict` on the raw rows"
            )
    if spec.WhichOneof("program") != "evaluate":
        return
    if document["task"] != manifest.task:
        yield f"it is for {document['task']}, and the data set is for {manifest.task}"
    elif list(manifest.classes) != list(document["classes"]):
        told, there = (
            listed([each[:_SHOWN] for each in classes], _CLASSES_SHOWN)
            for classes in (document["classes"], manifest.classes)
        )
        yield f"it tells {told} apart, and the data set has the classes {there}"


def _encoding(column: Column) -> tuple[object, ...]:
    """How a column becomes features; what replaces missing values is in them already."""
    return column.name, column.kind, column.vocabulary, column.missing_category
