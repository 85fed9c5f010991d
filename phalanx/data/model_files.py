"""The files of a trained model: what is in them, how they are built, how they are loaded.

``model.safetensors`` holds the parameters: a header from the layout, then the flat vector as it is,
so that storage can compose it of slices and its digest is that of the job. ``model.json`` says how
raw rows become features and outputs become labels, and where the model comes from. ``README.md``
says it to a person.

Building needs no arrays: the services that build models stay light.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from google.protobuf.json_format import MessageToDict

from phalanx.data.choice import RawColumns, choose
from phalanx.data.manifest import Column, DatasetManifest
from phalanx.errors import InvalidArgument
from phalanx.layouts import ITEM_BYTES
from phalanx.privacy.settings import accountant, is_private, sampling_rate
from phalanx.texts import number_of
from phalanx.training.best import Kept
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import Layout

if TYPE_CHECKING:
    from phalanx.data.predict import LoadedModel

MODEL_FORMAT = "phalanx.model/1"
PARAMETERS_FILE = "model.safetensors"
DESCRIPTION_FILE = "model.json"
README_FILE = "README.md"
BLOCK_ROWS = 256
"""Rows that go through a model at once; see ``phalanx.data.predict``."""

CLUSTERING, PROJECTION = "clustering", "projection"
UNSUPERVISED = {"k_means": CLUSTERING, "pca": PROJECTION}
"""What models do that look at no target."""

_ALIGNMENT_BYTES = 64
_SAFETENSORS_NAME = {"float32": "F32", "float64": "F64"}
_README_COLUMNS = 50


@dataclass(frozen=True)
class ModelDescription:
    """All that is written about a model.

    ``manifest`` is the whole data set, ``spec`` (which may have chosen columns of it) is resolved.
    ``steps`` made the parameters; ``job_steps`` are all that the job made, more than those where
    the ``best`` evaluation was kept. ``dataset`` is NAME@VERSION. ``libraries`` are the versions
    that computed it, by package; ``code_digests`` the hashes of the job's own code, by path.
    ``metrics`` are those of the parameters that were kept.
    """

    name: str
    job_id: str
    manifest: DatasetManifest
    manifest_digest: str
    spec: JobSpec
    spec_sha256: str
    layout: Layout
    parameters_sha256: str
    steps: int
    job_steps: int
    bit_identical: bool
    fingerprint: str
    dataset: str = ""
    libraries: Mapping[str, str] = field(default_factory=dict)
    code_digests: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    best: Kept | None = None


def safetensors_header(layout: Layout) -> bytes:
    """The first bytes of ``model.safetensors``; the flat vector, little endian, follows.

    Raises InvalidArgument for a layout whose sizes do not add up.
    """
    item_bytes = ITEM_BYTES.get(layout.dtype)
    if item_bytes is None:
        raise InvalidArgument(f"parameters are float32 or float64, not {layout.dtype!r}")
    header: dict[str, Any] = {"__metadata__": {"format": MODEL_FORMAT}}
    offset = 0
    for tensor in layout.tensors:
        size_bytes = math.prod(tensor.shape) * item_bytes
        header[tensor.name] = {
            "dtype": _SAFETENSORS_NAME[layout.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size_bytes],
        }
        offset += size_bytes
    if offset != layout.element_count * item_bytes:
        raise InvalidArgument(
            f"the tensors have {offset // item_bytes} elements, "
            f"the layout says {layout.element_count}"
        )
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT_BYTES)
    return len(text).to_bytes(8, "little") + text


def description_files(description: ModelDescription) -> dict[str, bytes]:
    """``model.json`` and ``README.md`` by name; equal descriptions give equal bytes."""
    return {
        DESCRIPTION_FILE: model_json(description),
        README_FILE: readme(description).encode(),
    }


def model_json(description: ModelDescription) -> bytes:
    """What a program needs to know of the model."""
    manifest, layout = _manifest_of(description), description.layout
    document = {
        "format": MODEL_FORMAT,
        "name": description.name,
        "job_id": description.job_id,
        "task": _task(description, manifest),
        "target": manifest.target,
        "classes": _classes(description, manifest),
        "class_kind": manifest.class_kind,
        "features": manifest.features,
        "feature_format": manifest.format,
        "feature_dtype": manifest.dtype,
        "columns": [asdict(column) for column in manifest.columns],
        "chosen_from": _chosen_from(description),
        "missing_markers": manifest.missing_markers,
        "standardisation": _standardisation(manifest, description.spec),
        "layout": MessageToDict(layout, preserving_proto_field_name=True),
        "parameters_sha256": description.parameters_sha256,
        "steps": description.steps,
        "job_steps": description.job_steps,
        "best": _best(description.best),
        "privacy": _privacy(description),
        "bit_identical": description.bit_identical,
        "fingerprint": description.fingerprint,
        "libraries": dict(description.libraries),
        "data": {"name": description.dataset, "manifest_digest": description.manifest_digest},
        "code": dict(description.code_digests),
        "spec": MessageToDict(description.spec, preserving_proto_field_name=True),
        "spec_sha256": description.spec_sha256,
        "metrics": {
            name: value if math.isfinite(value) else None
            for name, value in description.metrics.items()
        },
        "tags": dict(description.tags),
    }
    text = json.dumps(document, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    return f"{text}\n".encode()


def readme(description: ModelDescription) -> str:
    """What a person needs to know of the model, in Markdown."""
    manifest = _manifest_of(description)
    spec = description.spec
    program = spec.WhichOneof("program") or "model"
    kind = spec.train.model.WhichOneof("kind") or program if program == "train" else program
    what = _purpose(description, manifest)
    unit = "step" if program == "train" else "task"
    rows_text = ", ".join(f"{count:,} {split}" for split, count in manifest.rows_by_split().items())
    identical = (
        "The same job gives the same SHA-256 again, on any number of workers."
        if description.bit_identical
        else "The same job may give other last bits: it did not run on equal processors only."
    )
    if is_private(description.spec.train):
        identical = "The same job gives others again, since each has noise of its own."
    origin = (
        f"A `{kind}` that {what}. Trained by Phalanx in {number_of(description.steps, unit)} "
        f"(job `{description.job_id}`) on `{description.dataset or 'data'}`: {rows_text} rows, "
        f"{number_of(manifest.features, 'feature')}."
    )
    parameters = (
        f"`{PARAMETERS_FILE}`: {description.layout.element_count:,} of type "
        f"{description.layout.dtype}, SHA-256 `{description.parameters_sha256}`."
    )
    lines = [
        f"# {description.name}",
        "",
        origin,
        "",
        *_best_lines(description),
        *_privacy_lines(description),
        *_metric_lines(description),
        "## Use it",
        "",
        "```sh",
        "phalanx predict DIRECTORY rows.csv -o predictions.csv",
        "```",
        "",
        "```python",
        "from phalanx.data.model_files import load_model_directory",
        "",
        'model = load_model_directory("DIRECTORY")',
        "labels = model.predict(frame)  # raw columns, original labels",
        "```",
        "",
        *_column_lines(manifest),
        *_choice_lines(description),
        "## Parameters",
        "",
        f"{parameters} {identical}",
        "",
    ]
    return "\n".join(lines)


def load_model_directory(path: str | Path, *, allow_code: bool = False) -> "LoadedModel":
    """A model from its folder, checked against its hash.

    A model that brings code of its own is loaded only with ``allow_code``: predicting runs that
    code in this process. Raises NotFound for a missing folder or file, DataLoss for damaged ones
    and FailedPrecondition for code that was not allowed.
    """
    from phalanx.data.predict import LoadedModel

    return LoadedModel.load(Path(path), allow_code=allow_code)


def _manifest_of(description: ModelDescription) -> DatasetManifest:
    """The data set as the model sees it."""
    return choose(description.manifest, description.spec.data.features).manifest


def _task(description: ModelDescription, manifest: DatasetManifest) -> str:
    """What the model does: the task of its data, unless it looks at no target."""
    kind = description.spec.train.model.WhichOneof("kind") or ""
    return UNSUPERVISED.get(kind, manifest.task)


def _classes(description: ModelDescription, manifest: DatasetManifest) -> list[str]:
    supervised = _task(description, manifest) == manifest.task
    return list(manifest.classes) if supervised else []


def _purpose(description: ModelDescription, manifest: DatasetManifest) -> str:
    task, layout = _task(description, manifest), description.layout
    sizes = {tensor.name: tensor.shape for tensor in layout.tensors}
    if task == CLUSTERING:
        return f"puts rows into {number_of(sizes['centers'][0], 'cluster')}"
    if task == PROJECTION:
        return f"tells where rows lie along {number_of(sizes['components'][0], 'component')}"
    if task == "classification":
        classes = number_of(len(manifest.classes), "class", "classes")
        return f"tells {classes} of `{manifest.target}` apart"
    return f"predicts the number `{manifest.target}`"


def _chosen_from(description: ModelDescription) -> dict[str, Any] | None:
    """All columns of the data set by name, and how many; None where the model uses all."""
    if not description.spec.data.features:
        return None
    raw = RawColumns.of(description.manifest)
    return {"count": raw.count, "names": [column.name for column in raw.named]}


def _standardisation(manifest: DatasetManifest, spec: JobSpec) -> dict[str, Any] | None:
    if not (spec.train.model.standardise or spec.cascade.standardise):
        return None
    return {"mean": manifest.statistics.mean, "std": manifest.statistics.std}


def _best(best: Kept | None) -> dict[str, Any] | None:
    if best is None:
        return None
    return {"step": best.step, "metric": best.metric, "value": best.value}


def _privacy(description: ModelDescription) -> dict[str, Any] | None:
    """What all steps of a private job have spent, also where an earlier step was kept: which one
    depends on all of them."""
    train = description.spec.train
    if not is_private(train):
        return None
    rows = description.manifest.rows_by_split()[description.spec.data.split]
    return {
        "epsilon": accountant(train, rows).epsilon(description.job_steps),
        "delta": train.privacy.delta,
        "clip_norm": train.privacy.clip_norm,
        "noise_multiplier": train.privacy.noise_multiplier,
        "sampling_rate": sampling_rate(train, rows),
    }


def _privacy_lines(description: ModelDescription) -> list[str]:
    spent = _privacy(description)
    if spent is None:
        return []
    text = (
        f"Trained with differential privacy: ε = {spent['epsilon']:.4g} at δ = {spent['delta']:g} "
        f"for each row of the split `{description.spec.data.split}`, noise multiplier "
        f"{spent['noise_multiplier']:g}, norm {spent['clip_norm']:g}. It covers the parameters, "
        "not the metrics, nor columns, categories and classes."
    )
    return [text, ""]


def _best_lines(description: ModelDescription) -> list[str]:
    rule, best, last = description.spec.output.best, description.best, description.job_steps
    if best is not None:
        which = f"the best evaluation of the job by `{best.metric}`, {best.value:.6g}"
        return [f"These are the parameters of step {best.step:,} of {last:,}: {which}.", ""]
    if not description.spec.output.HasField("best"):
        return []
    why = f"no evaluation had a `{rule.metric}` within the bound that was asked for"
    return [f"These are the parameters of the last step: {why}.", ""]


def _metric_lines(description: ModelDescription) -> list[str]:
    if not description.metrics:
        return []
    values = [f"| {name} | {value:.6g} |" for name, value in sorted(description.metrics.items())]
    return ["| metric | value |", "| --- | --- |", *values, ""]


def _column_lines(manifest: DatasetManifest) -> list[str]:
    if not manifest.columns:
        return [
            "## Input",
            "",
            f"Arrays of {manifest.features:,} numbers per row, in the order of the training data.",
            "",
        ]
    shown = [_column_line(column) for column in manifest.columns[:_README_COLUMNS]]
    hidden = len(manifest.columns) - len(shown)
    more = [f"| … and {hidden:,} more, in `{DESCRIPTION_FILE}` | | |"] if hidden else []
    return [
        "## Input columns",
        "",
        "Columns go by name, others are ignored. An unknown category counts as none of them.",
        "",
        "| column | kind | a missing value |",
        "| --- | --- | --- |",
        *shown,
        *more,
        "",
    ]


def _choice_lines(description: ModelDescription) -> list[str]:
    chosen = len(description.spec.data.features)
    if not chosen:
        return []
    count = RawColumns.of(description.manifest).count
    text = (
        f"The job chose {number_of(chosen, 'column')} of {count:,}. Rows without column names are "
        "as wide as the training data, or hold these columns alone, in this order; sparse rows are "
        "as wide as the training data."
    )
    return [text, ""]


def _column_line(column: Column) -> str:
    kind = "number" if column.kind == "numeric" else f"one of {len(column.vocabulary):,} categories"
    if column.missing == "error":
        missing = "is an error"
    elif column.kind == "numeric":
        missing = f"becomes {column.fill[0]:.6g}"
    elif column.missing_category:
        missing = "is a category"
    elif column.missing == "category":
        missing = "is no category"
    else:
        missing = "becomes the mean"
    return f"| {column.name} | {kind} | {missing} |"
