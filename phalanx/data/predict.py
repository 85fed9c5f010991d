"""Predicting with a trained model: raw rows in, original labels out.

Rows go through the model in blocks of ``BLOCK_ROWS``, the last one filled up with zeros. Matrix
products of other heights have other bits; with one height a row's prediction depends neither on how
many rows were asked for, nor on whether they came raw or prepared. A model without products says
how high its blocks are at most, and they are not filled.
"""

import hashlib
import json
import mmap
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
from google.protobuf.json_format import ParseDict, ParseError
from numpy.typing import NDArray

from phalanx.data.choice import RawColumns
from phalanx.data.manifest import Column, Statistics, columns_from, label_from_text
from phalanx.data.model_files import (
    BLOCK_ROWS,
    DESCRIPTION_FILE,
    MODEL_FORMAT,
    PARAMETERS_FILE,
    PROJECTION,
    safetensors_header,
)
from phalanx.data.raw_rows import RawRows, Remarks
from phalanx.data.reader import aligned_empty
from phalanx.data.statistics import mean_and_scale, standardise
from phalanx.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound
from phalanx.models import DataSchema, build_model
from phalanx.models.base import Predictor
from phalanx.programs.predicting import predictor_of
from phalanx.tasks import is_program
from phalanx.texts import number_of
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import Layout
from phalanx.wheels import wheel_path, write_code


@dataclass(frozen=True)
class Predictions:
    """Predictions of some rows, in order.

    ``labels`` are original labels, or numbers for a regression. ``probabilities`` is rows by
    classes, in the order of the model's classes; None for a regression, and for models that tell
    two classes apart without any. Of these ``decision_values`` has one number per row: the second
    class is predicted where it is above 0.
    """

    labels: NDArray[Any]
    probabilities: NDArray[Any] | None
    decision_values: NDArray[Any] | None = None

    @property
    def rows(self) -> int:
        """How many rows."""
        return len(self.labels)


class LoadedModel:
    """A model in memory.

    ``document`` is ``model.json``. ``classes`` are the original labels in the order of the columns
    of ``predict_probabilities``; empty for a regression. Rows of any kind are taken: the path of a
    file, a frame (pandas, polars, Arrow), a mapping of columns, a list of rows by column name, or
    an array.

    An unknown category counts as none of the known ones, a missing column is an error, another
    column is ignored, and a missing value does what it did in training; ``remarks`` tells of the
    last prediction. Columns of the training data that the job did not choose are such others; rows
    without column names may have them or not (sparse ones have them).
    """

    def __init__(
        self, document: dict[str, Any], parameters: NDArray[Any], model: Predictor
    ) -> None:
        self.document = document
        self.parameters = parameters
        self.model = model
        self.name: str = document["name"]
        self.task: str = document["task"]
        self.target: str = document["target"]
        #: Names of what is predicted for a row, the probabilities of classes apart.
        self.output_names = _output_names(document)
        self.parameters_sha256: str = document["parameters_sha256"]
        self.metrics: dict[str, float] = document["metrics"]
        self.remarks = Remarks()
        labels = [label_from_text(text, document["class_kind"]) for text in document["classes"]]
        self.classes: NDArray[Any] = np.array(labels)
        self._raw = RawRows(
            columns=columns_from(document["columns"]),
            features=document["features"],
            # Bytes are exact in float32, and raw rows may hold what is not a byte.
            dtype="float64" if document["feature_dtype"] == "float64" else "float32",
            sparse=document["feature_format"] == "csr",
            target=self.target,
            missing_markers=tuple(document["missing_markers"]),
            chosen_from=_chosen_from(document),
        )
        self._scales = _scales(document, parameters.dtype)
        self._block_rows: int = getattr(model, "block_rows", BLOCK_ROWS)
        self._fills = not hasattr(model, "block_rows")
        #: Whether it standardises its features.
        self.standardises = self._scales is not None

    @staticmethod
    def load(folder: Path, *, allow_code: bool = False) -> "LoadedModel":
        """See ``phalanx.data.model_files.load_model_directory``."""
        stored = _Stored.read(folder / DESCRIPTION_FILE, folder / PARAMETERS_FILE)
        code_dir = _write_code(stored.spec, folder, allow_code)
        try:
            loaded = stored.loaded(code_dir)
        except BaseException:
            _remove(code_dir)
            raise
        # Code may import more of itself later, as long as the model is in use.
        weakref.finalize(loaded, _remove, code_dir)
        return loaded

    @staticmethod
    def of_files(files: Mapping[str, Path], code_dir: Path | None, gpus: int = 0) -> "LoadedModel":
        """A model whose files lie anywhere, by their names; ``code_dir`` holds its own code, which
        runs in this process. With ``gpus`` a PyTorch module computes on one. Raises NotFound and
        DataLoss; FailedPrecondition where there is no GPU."""
        for name in (DESCRIPTION_FILE, PARAMETERS_FILE):
            if name not in files:
                raise NotFound(f"the model has no {name}")
        return _Stored.read(files[DESCRIPTION_FILE], files[PARAMETERS_FILE]).loaded(code_dir, gpus)

    def predict(self, data: Any) -> NDArray[Any]:
        """Original labels, numbers for a regression or of clusters, one per row; (rows, components)
        coordinates for a projection.

        Raises InvalidArgument for a missing column, a missing value where training had none, and a
        cell without meaning, with its place.
        """
        return self._all(self.predict_batches(data)).labels

    @cached_property
    def has_decision_values(self) -> bool:
        """Whether one number per row tells two classes apart, and there are no probabilities."""
        if self.task != "classification":
            return False
        one = np.zeros((1, self._raw.features), self.parameters.dtype)
        row = scipy.sparse.csr_array(one) if self._raw.sparse else one
        return bool(self.model.predict(self.parameters, row).ndim == 1)

    def predict_probabilities(self, data: Any) -> NDArray[Any]:
        """Rows by classes; raises InvalidArgument for a model that has none."""
        if self.task != "classification":
            raise InvalidArgument(f"{self.name} tells no classes apart, it has no probabilities")
        if self.has_decision_values:
            raise InvalidArgument(
                f"{self.name} tells classes apart by decision values, it has no probabilities; "
                "use predict_decision_values, or train a logistic_regression"
            )
        probabilities = self._all(self.predict_batches(data)).probabilities
        assert probabilities is not None
        return probabilities

    def predict_decision_values(self, data: Any) -> NDArray[Any]:
        """One number per row of a model without probabilities: the second class above 0.

        Raises InvalidArgument for any other model.
        """
        if not self.has_decision_values:
            raise InvalidArgument(f"{self.name} is no model with decision values")
        values = self._all(self.predict_batches(data)).decision_values
        assert values is not None
        return values

    def feature_importances(self) -> dict[str, float]:
        """How much each feature of a forest counts, by name (``x1`` … where the training data had
        none), all together 1; raises InvalidArgument for a model that does not say."""
        counts = getattr(self.model, "feature_importances", None)
        if counts is None:
            raise InvalidArgument(f"{self.name} does not say how much its features count")
        columns = columns_from(self.document["columns"])
        names = [name for column in columns for name in column.feature_names()]
        names = names or [f"x{index + 1}" for index in range(self.document["features"])]
        return dict(zip(names, counts(self.parameters).tolist(), strict=True))

    def predict_batches(self, data: Any) -> Iterator[Predictions]:
        """Predictions block by block, in memory that does not grow with the rows."""
        pieces, self.remarks = self._raw.encode(data)
        return self._predictions(pieces)

    def prepare(self, data: Any) -> Any:
        """Features of raw rows as the model's chunks would hold them: an array, or a CSR matrix."""
        pieces, self.remarks = self._raw.encode(data)
        parts = list(pieces)
        if self._raw.sparse:
            empty = scipy.sparse.csr_array((0, self._raw.features), dtype=self._raw.dtype)
            return scipy.sparse.csr_array(scipy.sparse.vstack([empty, *parts]))
        return np.concatenate([np.empty((0, self._raw.features), self._raw.dtype), *parts])

    def predict_prepared(self, features: Any) -> Predictions:
        """Predictions for rows that ``prepare`` returned, or that were read from chunks."""
        return self._all(self._predictions(self._raw.prepared(features)))

    def to_sklearn(self) -> Any:
        """The model as a fitted object of scikit-learn, where there is a class for it.

        It takes rows as ``prepare`` returns them and predicts the same, but for the last bits;
        where the model standardises, it is a pipeline. Raises InvalidArgument (NO_COUNTERPART) for
        a model that no class computes, and FailedPrecondition without scikit-learn.
        """
        from phalanx.exports.estimators import estimator_of

        return estimator_of(self)

    def _predictions(self, pieces: Iterable[Any]) -> Iterator[Predictions]:
        for block, rows in self._blocks(pieces):
            if self._scales is not None:
                standardise(block, *self._scales)
            outputs = self.model.predict(self.parameters, block)[:rows]
            if self.task != "classification":
                yield Predictions(outputs, None)
            elif outputs.ndim == 1:
                yield self._decided(outputs)
            else:
                yield Predictions(self.classes[outputs.argmax(axis=1)], outputs)

    def _decided(self, values: NDArray[Any]) -> Predictions:
        """Predictions by decision values. Raises InvalidArgument where these cannot be such."""
        if len(self.classes) != 2:
            classes = number_of(len(self.classes), "class", "classes")
            raise InvalidArgument(
                f"{self.name} gives one number for each row, which tells two classes apart, and "
                f"has {classes}; a model has to give a probability for each"
            )
        return Predictions(self.classes[(values > 0).astype(int)], None, values)

    def _blocks(self, pieces: Iterable[Any]) -> Iterator[tuple[Any, int]]:
        """Blocks of rows in the parameters' type, and how many of each count."""
        waiting: list[Any] = []
        count = 0
        for piece in pieces:
            first = 0
            while first < piece.shape[0]:
                part = piece[first : first + self._block_rows - count]
                waiting.append(part)
                count += part.shape[0]
                first += part.shape[0]
                if count == self._block_rows:
                    yield self._block(waiting), count
                    waiting, count = [], 0
        if count:
            yield self._block(waiting), count

    def _block(self, parts: list[Any]) -> Any:
        rows = sum(part.shape[0] for part in parts)
        height = self._block_rows if self._fills else rows
        shape, dtype = (height, self._raw.features), self.parameters.dtype
        if self._raw.sparse:
            empty = scipy.sparse.csr_array((shape[0] - rows, shape[1]), dtype=dtype)
            stacked = scipy.sparse.vstack([*parts, empty], format="csr", dtype=dtype)
            return scipy.sparse.csr_array(stacked)
        block = aligned_empty(shape, dtype)
        first = 0
        for part in parts:
            block[first : first + len(part)] = part
            first += len(part)
        block[rows:] = 0
        return block

    def _all(self, batches: Iterable[Predictions]) -> Predictions:
        parts = list(batches)
        if not parts:
            return self._nothing()
        labels = np.concatenate([part.labels for part in parts])
        probabilities = [part.probabilities for part in parts if part.probabilities is not None]
        values = [part.decision_values for part in parts if part.decision_values is not None]
        return Predictions(
            labels,
            np.concatenate(probabilities) if probabilities else None,
            np.concatenate(values) if values else None,
        )

    def _nothing(self) -> Predictions:
        """Predictions of no rows."""
        if self.task != "classification":
            several = len(self.output_names) > 1
            return Predictions(np.empty((0, len(self.output_names)) if several else 0), None)
        if self.has_decision_values:
            return Predictions(self.classes[:0], None, np.empty(0))
        return Predictions(self.classes[:0], np.empty((0, len(self.classes))))


def _output_names(document: dict[str, Any]) -> tuple[str, ...]:
    if document["task"] != PROJECTION:
        return ("prediction",)
    shapes = {each["name"]: each["shape"] for each in document["layout"]["tensors"]}
    return tuple(f"component {number}" for number in range(1, int(shapes["components"][0]) + 1))


def _write_code(spec: JobSpec, model: Path, allowed: bool) -> Path | None:
    """The job's own code as files of a new folder; None where it brings none."""
    if not spec.code.files and not spec.code.wheels:
        return None
    wheels = {wheel_path(digest): model / wheel_path(digest) for digest in spec.code.wheels}
    if not allowed:
        names = sorted([*spec.code.files, *wheels])
        entrypoint = spec.train.model.custom.entrypoint or spec.train.model.torch.module
        raise FailedPrecondition(
            f"the model {entrypoint} runs code of its own "
            f"({', '.join(names)}); if you trust it, pass allow_code=True",
            reason="CODE_NOT_ALLOWED",
        )
    for digest, path in zip(spec.code.wheels, wheels.values(), strict=True):
        if not path.is_file():
            raise NotFound(f"{model} is no whole model: it has no {wheel_path(digest)}")
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                raise DataLoss(f"{path} is damaged: it has another SHA-256")
    folder = Path(tempfile.mkdtemp(prefix="phalanx-model-"))
    try:
        files = {name: text.encode() for name, text in spec.code.files.items()}
        write_code(folder, files, wheels)
    except InvalidArgument as error:
        _remove(folder)
        if error.reason == "WHEEL_FOR_ANOTHER_PYTHON":
            raise
        raise DataLoss(f"{model} is damaged: {error.message}") from error
    except BaseException:
        _remove(folder)
        raise
    return folder


def _remove(folder: Path | None) -> None:
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class _Stored:
    """What is read of a model before its own code is needed."""

    path: Path
    document: dict[str, Any]
    spec: JobSpec
    layout: Layout
    parameters: NDArray[Any]

    @staticmethod
    def read(path: Path, parameters: Path) -> "_Stored":
        """Reads the description at ``path``, and the parameters."""
        document = _read_description(path)
        spec, layout = JobSpec(), Layout()
        try:
            ParseDict(document["spec"], spec)
            ParseDict(document["layout"], layout)
        except (ParseError, KeyError) as error:
            raise DataLoss(f"{path} is damaged: {error}") from error
        return _Stored(path, document, spec, layout, _read_parameters(parameters, layout, document))

    def loaded(self, code_dir: Path | None, gpus: int = 0) -> LoadedModel:
        """Builds the model. What it was trained on does not matter: where some have a GPU and
        others have not, predictions would depend on who computes them."""
        document, layout = self.document, self.layout
        schema = DataSchema(document["features"], len(document["classes"]), layout.dtype)
        if is_program(self.spec):
            model: Predictor = predictor_of(self.spec, layout, schema.classes)
        else:
            spec = JobSpec()
            spec.CopyFrom(self.spec)
            spec.resources.gpus = gpus
            model = build_model(spec, schema, code_dir)
        if model.layout != layout:
            where = self.path.parent
            raise DataLoss(f"{where}: parameters and {DESCRIPTION_FILE} do not fit each other")
        return LoadedModel(document, self.parameters, model)


def _read_description(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise NotFound(f"{path.parent} is no model: it has no {DESCRIPTION_FILE}") from error
    except ValueError as error:
        raise DataLoss(f"{path} is damaged: {error}") from error
    if not isinstance(document, dict) or document.get("format") != MODEL_FORMAT:
        raise DataLoss(f"{path} does not describe a model of format {MODEL_FORMAT}")
    return document


def _read_parameters(path: Path, layout: Layout, document: dict[str, Any]) -> NDArray[Any]:
    """The flat vector, mapped; raises DataLoss unless the file is what the description says."""
    header = safetensors_header(layout)
    dtype: np.dtype[Any] = np.dtype(layout.dtype).newbyteorder("<")
    try:
        with path.open("rb") as file:
            view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except FileNotFoundError as error:
        raise NotFound(f"{path.parent} is no model: it has no {path.name}") from error
    except ValueError as error:
        raise DataLoss(f"{path} is empty") from error
    body = view[len(header) :]
    if view[: len(header)] != header or len(body) != layout.element_count * dtype.itemsize:
        raise DataLoss(f"{path} does not hold the tensors that {DESCRIPTION_FILE} names")
    if hashlib.sha256(body).hexdigest() != document["parameters_sha256"]:
        raise DataLoss(f"{path} is damaged: its parameters have another SHA-256")
    return np.frombuffer(body, dtype=dtype)


def _chosen_from(document: dict[str, Any]) -> RawColumns | None:
    """All columns of the training data, where the model uses some of them."""
    whole = document.get("chosen_from")  # models from before jobs chose columns have no such entry
    if whole is None:
        return None
    return RawColumns(whole["count"], tuple(Column(name) for name in whole["names"]))


def _scales(
    document: dict[str, Any], dtype: np.dtype[Any]
) -> tuple[NDArray[Any], NDArray[Any]] | None:
    standardisation = document["standardisation"]
    if standardisation is None or len(standardisation["mean"]) != document["features"]:
        return None
    statistics = Statistics(0, tuple(standardisation["mean"]), tuple(standardisation["std"]))
    return mean_and_scale(statistics, dtype)
