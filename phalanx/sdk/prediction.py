"""Predictions for a file of raw rows, block by block: memory does not grow with the file."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from phalanx.errors import InvalidArgument
from phalanx.files import completed

if TYPE_CHECKING:
    from phalanx.data.predict import LoadedModel, Predictions

PROBABILITY = "probability of "
DECISION_VALUE = "decision value"
ROWS_PER_WRITE = 8192


@dataclass(frozen=True)
class Predicted:
    """How many rows were predicted, and what was odd about them, a sentence per column."""

    rows: int
    remarks: tuple[str, ...]


Write = Callable[["Predictions"], None]


def predict_file(model: LoadedModel, input: Path, output: Path | BinaryIO) -> Predicted:
    """Predict all rows of a file; write one row for each, in order.

    The columns are ``prediction`` and, for classes, ``probability of CLASS`` for each, or the
    ``decision value`` of a model that has no probabilities; of a projection ``component 1`` and so
    on. A path ending in .parquet gets Parquet, all else is CSV. A file appears only when it is
    complete. Raises InvalidArgument for a wrong row, with its place, and where the file is the
    input itself.
    """
    if not isinstance(output, Path):
        # A file that is missing or wrong from the start is told before anything is written.
        blocks = model.predict_batches(input)
        begun = list(islice(blocks, 1))
        return _predict(model, chain(begun, blocks), _csv_writer(model, output))
    if output.suffix not in (".csv", ".parquet"):
        raise InvalidArgument(f"{output} ends in neither .csv nor .parquet")
    if output.exists() and input.exists() and output.samefile(input):
        raise InvalidArgument(f"{output} holds the raw rows; write the predictions elsewhere")
    with completed(output) as partial, partial.open("wb") as stream:
        blocks = model.predict_batches(input)
        if output.suffix == ".csv":
            return _predict(model, blocks, _csv_writer(model, stream))
        with _ParquetWriter(model, stream) as write:
            return _predict(model, blocks, write)


def predicted_rows(model: LoadedModel, input: Path) -> Iterator[dict[str, Any]]:
    """Yield a JSON object for each row of a file."""
    classes = [str(label) for label in model.classes.tolist()]
    for block in model.predict_batches(input):
        labels = block.labels.tolist()
        if len(model.output_names) > 1:
            yield from ({"components": values} for values in labels)
        elif block.decision_values is not None:
            for label, value in zip(labels, block.decision_values.tolist(), strict=True):
                yield {"prediction": label, "decision_value": value}
        elif block.probabilities is not None:
            for label, row in zip(labels, block.probabilities.tolist(), strict=True):
                yield {"prediction": label, "probabilities": dict(zip(classes, row, strict=True))}
        else:
            yield from ({"prediction": label} for label in labels)


def _predict(model: LoadedModel, blocks: Iterable[Predictions], write: Write) -> Predicted:
    rows = 0
    for block in blocks:
        write(block)
        rows += block.rows
    return Predicted(rows, model.remarks.sentences)


def headings(model: LoadedModel) -> list[str]:
    """Return the names of the columns that predictions are written with."""
    if model.has_decision_values:
        return ["prediction", DECISION_VALUE]
    return [*model.output_names, *(f"{PROBABILITY}{label}" for label in model.classes.tolist())]


def _columns(block: Predictions) -> Sequence[list[Any]]:
    if block.labels.ndim > 1:
        return list(block.labels.T.tolist())
    labels = block.labels.tolist()
    if block.decision_values is not None:
        return [labels, block.decision_values.tolist()]
    if block.probabilities is None:
        return [labels]
    return [labels, *block.probabilities.T.tolist()]


def _csv_writer(model: LoadedModel, stream: BinaryIO) -> Write:
    def write_rows(rows: Any) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        stream.write(text.getvalue().encode())

    def write(block: Predictions) -> None:
        write_rows(zip(*_columns(block), strict=True))

    write_rows([headings(model)])
    return write


class _ParquetWriter(AbstractContextManager["_ParquetWriter"]):
    """Gathers blocks to row groups of a sensible size."""

    def __init__(self, model: LoadedModel, stream: BinaryIO) -> None:
        self._headings = headings(model)
        self._stream = stream
        self._writer: Any = None
        self._waiting: list[list[Any]] = [[] for _ in self._headings]

    def __call__(self, block: Predictions) -> None:
        for waiting, values in zip(self._waiting, _columns(block), strict=True):
            waiting.extend(values)
        if len(self._waiting[0]) >= ROWS_PER_WRITE:
            self._flush()

    def __exit__(self, *_error: object) -> None:
        if self._waiting[0] or self._writer is None:
            self._flush()
        self._writer.close()

    def _flush(self) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        table = pa.table(dict(zip(self._headings, self._waiting, strict=True)))
        if self._writer is None:
            self._writer = parquet.ParquetWriter(self._stream, table.schema)
        self._writer.write_table(table)
        self._waiting = [[] for _ in self._headings]
