"""The columns that a job chooses: in one order, and checked against its data set."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from itertools import islice

from phalanx.data.choice import RawColumns
from phalanx.errors import Violation
from phalanx.v1 import dataset_service_pb2, job_spec_pb2

PATH = "data.features"
_SHOWN = 20
_NAMES_COMPARED = 10_000
"""Looking for names alike takes long among more."""


def repeated(data: job_spec_pb2.Data) -> Iterator[Violation]:
    """Yield what is wrong with the names whatever the data set."""
    seen: set[str] = set()
    for index, name in enumerate(data.features):
        if not name:
            yield Violation(f"{PATH}[{index}]", "is empty; name a column, or leave all out for all")
        elif name in seen:
            yield Violation(f"{PATH}[{index}]", f"{name[:60]!r} is given twice")
        seen.add(name)


def resolve(data: job_spec_pb2.Data, columns: RawColumns) -> None:
    """Write the names in the order of the data set, and none where all of them are chosen.

    So jobs with the same columns have the same spec. Wrong names stay for validation.
    """
    positions = {columns.position(name) for name in data.features}
    if None in positions or len(positions) < len(data.features):
        return
    chosen = sorted(position for position in positions if position is not None)
    all_of_them = len(chosen) == columns.count
    data.features[:] = [] if all_of_them else [columns.column(each).name for each in chosen]


def feature_count(data: job_spec_pb2.Data, columns: RawColumns) -> int:
    """Return how many features the chosen columns become; names that are wrong count nothing."""
    positions = {columns.position(name) for name in data.features}
    return sum(columns.column(each).width for each in positions if each is not None)


def as_chosen(
    dataset: dataset_service_pb2.Dataset, data: job_spec_pb2.Data, columns: RawColumns | None
) -> dataset_service_pb2.Dataset:
    """Return the data set as it is for a job that may have chosen columns: with their features."""
    if columns is None or not data.features:
        return dataset
    seen = dataset_service_pb2.Dataset()
    seen.CopyFrom(dataset)
    seen.features = feature_count(data, columns)
    return seen


def violations(
    data: job_spec_pb2.Data, dataset: dataset_service_pb2.Dataset, columns: RawColumns
) -> Iterator[Violation]:
    """Yield what is wrong between the names and the columns of the data set."""
    unknown = [
        (index, name) for index, name in enumerate(data.features) if columns.position(name) is None
    ]
    for index, name in unknown[:_SHOWN]:
        yield Violation(f"{PATH}[{index}]", unknown_column(name, data.name, dataset, columns))
    if len(unknown) > _SHOWN:
        yield Violation(PATH, f"{len(unknown) - _SHOWN} more names are not known")
    if data.features and not unknown and feature_count(data, columns) == 0:
        message = "leaves nothing to learn from: these columns have no categories"
        yield Violation(PATH, f"{message}; choose others, or leave it out to use all")


def unknown_column(
    name: str, data_name: str, dataset: dataset_service_pb2.Dataset, columns: RawColumns
) -> str:
    """Return the sentence about a name that a data set does not have."""
    shown = repr(name[:60])
    if name == dataset.target:
        return f"{shown} is the target of {data_name}, which no model may see"
    if not columns.named:
        return (
            f"{data_name} has no column {shown}; its columns have no names and go by their place, "
            f"x1 to x{columns.count}"
        )
    text = f"{data_name} has no column {shown}"
    close = _nearest(name, columns)
    if close:
        return f"{text}; did you mean {' or '.join(repr(each) for each in close)}?"
    names = ", ".join(column.name for column in columns.named[:_SHOWN])
    more = " …" if columns.count > _SHOWN else ""
    return f"{text}; it has: {names[:400]}{more} (see `phalanx data show`)"


def _nearest(name: str, columns: RawColumns) -> list[str]:
    """Return the column of which the name is a category, or up to three that read alike."""
    column = name.partition("=")[0]
    if columns.position(column) is not None:
        return [column]
    alike = {each.name.casefold(): each.name for each in islice(columns.named, _NAMES_COMPARED)}
    close = difflib.get_close_matches(name[:100].casefold(), alike, n=3, cutoff=0.6)
    return [alike[each] for each in close]
