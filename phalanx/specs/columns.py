"""Shards that are groups of columns: their names, written out, and what does not go with them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby

from phalanx.data.choice import RawColumns, choose, merged
from phalanx.data.manifest import DatasetManifest
from phalanx.errors import Violation
from phalanx.specs import features, parts
from phalanx.texts import number_of
from phalanx.v1 import dataset_service_pb2, job_spec_pb2

MODELS = ("linear_regression", "logistic_regression")
OPTIMIZERS = (None, "sgd", "adagrad", "adam", "adamw")

_PATH = "data.columns"
_GROUPS = f"{_PATH}.groups"
_RANGE = re.compile(r"(x[1-9][0-9]{0,17})-(x[1-9][0-9]{0,17})", re.ASCII)
_SHOWN = 20


@dataclass
class Group:
    """The columns that one text names, by their positions, and the names that there are not."""

    positions: list[int] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def read_group(text: str, columns: RawColumns) -> Group:
    """Return which columns a text names.

    A comma may be a part of a name: the longest name that there is counts.
    """
    group, words, first = Group(), text.split(","), 0
    while first < len(words):
        for stop in range(len(words), first, -1):
            found = _positions(",".join(words[first:stop]).strip(), columns)
            if found:
                group.positions += found
                break
        else:
            stop = first + 1
            group.unknown.append(words[first].strip())
        first = stop
    return group


def positions_of_shards(data: job_spec_pb2.Data, columns: RawColumns) -> list[list[int]]:
    """Return the positions of the columns of each shard, of a resolved spec.

    Without groups shard i of S has the columns i·n÷S to (i+1)·n÷S of the n that the job uses.
    """
    if data.columns.groups:
        return [sorted(read_group(text, columns).positions) for text in data.columns.groups]
    used, shards = _used(data, columns), data.shards
    cuts = [each * len(used) // shards for each in range(shards + 1)]
    return [list(used[cuts[each] : cuts[each + 1]]) for each in range(shards)]


def names_of_shards(data: job_spec_pb2.Data, manifest: DatasetManifest) -> list[list[str]]:
    """Return the names of the columns of each shard."""
    columns = RawColumns.of(manifest)
    return [
        [columns.column(position).name for position in positions]
        for positions in positions_of_shards(data, columns)
    ]


def features_of_shards(
    data: job_spec_pb2.Data, manifest: DatasetManifest
) -> tuple[tuple[range, ...], ...]:
    """Return which features of the job's model are those of each shard.

    Nothing where shards are rows.
    """
    if not parts.by_columns(data):
        return ()
    used = RawColumns.of(choose(manifest, data.features).manifest)
    found = []
    for names in names_of_shards(data, manifest):
        positions = [used.position(name) for name in names]
        found.append(merged(used.features(each) for each in positions if each is not None))
    return tuple(found)


def resolve(data: job_spec_pb2.Data, columns: RawColumns) -> None:
    """Write the names of each group in the order of the data set; the order of groups stays.

    Wrong names stay for validation.
    """
    if not parts.by_columns(data):
        return
    groups = [read_group(text, columns) for text in data.columns.groups]
    if not any(group.unknown for group in groups):
        data.columns.groups[:] = [_text(group.positions, columns) for group in groups]


def violations(spec: job_spec_pb2.JobSpec) -> Iterator[Violation]:
    """Yield what does not go with groups of columns; works on raw as well as resolved specs."""
    data, train = spec.data, spec.train
    if not parts.by_columns(data):
        return
    if not spec.HasField("train"):
        yield Violation(_PATH, "is for train; other programs read whole rows: leave it out")
        return
    model, optimizer = train.model.WhichOneof("kind"), train.optimizer.WhichOneof("kind")
    if model not in (None, *MODELS):
        message = (
            "is for linear_regression and logistic_regression, whose scores are sums over the "
            f"columns; use rows for {model}"
        )
        yield Violation(_PATH, message)
    elif optimizer not in OPTIMIZERS:
        message = "needs whole rows, and shards of data.columns see some columns of each; use sgd"
        yield Violation(f"train.optimizer.{optimizer}", message)
    yield from _number(data)


def violations_against(
    data: job_spec_pb2.Data, dataset: dataset_service_pb2.Dataset, columns: RawColumns
) -> Iterator[Violation]:
    """Yield what is wrong between the groups and the columns of the data set."""
    if not parts.by_columns(data):
        return
    used = _used(data, columns)
    if not data.columns.groups:
        if data.shards > len(used):
            count = number_of(data.shards, "shard")
            message = f"{count}: more than the {number_of(len(used), 'column')} of {data.name}"
            yield Violation("data.shards", message)
        elif data.shards > 0:
            yield from _even(data, columns)
        return
    wrong = [
        violation
        for index, text in enumerate(data.columns.groups)
        for violation in _names(f"{_GROUPS}[{index}]", text, data, dataset, columns)
    ]
    yield from wrong[:_SHOWN]
    if not wrong:
        yield from _cover(data, columns, used)


def _number(data: job_spec_pb2.Data) -> Iterator[Violation]:
    """Groups are shards, so there are as many."""
    count = len(data.columns.groups)
    if not count and not data.HasField("shards"):
        message = "needs the groups, or data.shards to divide the columns evenly among so many"
        yield Violation(_PATH, message)
    elif count and data.HasField("shards") and data.shards != count:
        message = f"{data.shards} is not the number of {_GROUPS}, {count}; leave it out"
        yield Violation("data.shards", message)


def _even(data: job_spec_pb2.Data, columns: RawColumns) -> Iterator[Violation]:
    """Columns divided evenly leave every shard something, unless its columns are no features."""
    if not columns.named:
        return  # each column is one
    for positions in positions_of_shards(data, columns):
        if not any(columns.column(each).width for each in positions):
            names = ", ".join(repr(columns.column(each).name[:60]) for each in positions[:_SHOWN])
            message = (
                f"{number_of(data.shards, 'shard')} leave one of them {names} alone, which has no "
                f"categories to learn from; use fewer, or write {_GROUPS}"
            )
            yield Violation("data.shards", message)


def _names(
    path: str,
    text: str,
    data: job_spec_pb2.Data,
    dataset: dataset_service_pb2.Dataset,
    columns: RawColumns,
) -> Iterator[Violation]:
    group = read_group(text, columns)
    for name in group.unknown:
        if not name:
            message = "names no column somewhere; write names with single commas between them"
            yield Violation(path, message)
        else:
            yield Violation(path, features.unknown_column(name, data.name, dataset, columns))
    if not group.unknown and not any(columns.column(each).width for each in group.positions):
        yield Violation(path, "leaves nothing to learn from: these columns have no categories")


def _cover(
    data: job_spec_pb2.Data, columns: RawColumns, used: range | list[int]
) -> Iterator[Violation]:
    """Each column that the job uses is in one group."""
    owner: dict[int, int] = {}
    for index, text in enumerate(data.columns.groups):
        for position in read_group(text, columns).positions:
            path, name = f"{_GROUPS}[{index}]", repr(columns.column(position).name[:60])
            if position in owner:
                where = f"{_GROUPS}[{owner[position]}]"
                yield Violation(path, f"{name} is in {where} already; a column is in one group")
            elif data.features and position not in used:
                yield Violation(path, f"{name} is none of data.features")
            owner.setdefault(position, index)
    left = [position for position in used if position not in owner]
    if left:
        names = ", ".join(repr(columns.column(each).name[:60]) for each in left[:_SHOWN])
        more = " …" if len(left) > _SHOWN else ""
        message = (
            f"name {names}{more} in no group; put each column into one, or choose columns in "
            "data.features"
        )
        yield Violation(_GROUPS, message)


def _used(data: job_spec_pb2.Data, columns: RawColumns) -> range | list[int]:
    """Positions of the columns that the job uses, in order."""
    if not data.features:
        return range(columns.count)
    positions = {columns.position(name) for name in data.features}
    return sorted(each for each in positions if each is not None)


def _positions(name: str, columns: RawColumns) -> Iterable[int]:
    """Return the positions that a name or a range stands for; none where it is neither."""
    position = columns.position(name)
    if position is not None:
        return (position,)
    ends = None if columns.named else _RANGE.fullmatch(name)
    if ends is None:
        return ()
    first, last = columns.position(ends[1]), columns.position(ends[2])
    return () if first is None or last is None else range(first, last + 1)


def _text(positions: Iterable[int], columns: RawColumns) -> str:
    ordered = sorted(positions)
    if columns.named:
        return ",".join(columns.column(each).name for each in ordered)
    runs = [
        [position for _, position in run]
        for _, run in groupby(enumerate(ordered), lambda each: each[1] - each[0])
    ]
    names = [[columns.column(run[0]).name, columns.column(run[-1]).name] for run in runs]
    return ",".join(first if first == last else f"{first}-{last}" for first, last in names)
