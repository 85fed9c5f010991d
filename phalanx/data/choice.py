"""Some of the raw columns of a data set: the data set as a job sees it that chose them.

Needs no arrays: the services that check jobs and describe models stay light.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

from phalanx.data.manifest import Column, DatasetManifest, Statistics
from phalanx.errors import InvalidArgument

_NUMBERED = re.compile(r"x([1-9][0-9]{0,17})", re.ASCII)


@dataclass(frozen=True)
class RawColumns:
    """The raw columns of a data set, in order.

    Without ``named`` they are ``count`` columns of one feature each, called ``x1`` … ``xN`` by
    their position. Those are never listed: sparse data has millions of them.
    """

    count: int
    named: tuple[Column, ...] = ()

    @staticmethod
    def of(manifest: DatasetManifest) -> "RawColumns":
        """All columns of a data set."""
        return RawColumns(len(manifest.columns) or manifest.features, manifest.columns)

    def position(self, name: str) -> int | None:
        """Where the column of a name stands, counted from 0; None: there is none."""
        if self.named:
            return self._positions.get(name)
        number = _NUMBERED.fullmatch(name)
        if number is None or int(number[1]) > self.count:
            return None
        return int(number[1]) - 1

    def column(self, position: int) -> Column:
        """The column at a position."""
        return self.named[position] if self.named else Column(f"x{position + 1}")

    def features(self, position: int) -> range:
        """Which features the column at a position becomes."""
        if not self.named:
            return range(position, position + 1)
        return range(self._ends[position] - self.named[position].width, self._ends[position])

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {column.name: position for position, column in enumerate(self.named)}

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(column.width for column in self.named))


@dataclass(frozen=True)
class Choice:
    """What a job uses of a data set.

    ``manifest`` is that of a data set with these columns alone, but for its chunks, which hold the
    rows whole. ``runs`` are the chosen features by their places in such a row, in order, neighbours
    together.
    """

    manifest: DatasetManifest
    runs: tuple[range, ...]


def choose(manifest: DatasetManifest, names: Collection[str]) -> Choice:
    """The columns of these names, in the order of the data set; without names all of them.

    Columns without names get those that their positions give them. The statistics are those of the
    data set. Raises InvalidArgument for a name that the data set does not have.
    """
    everything = Choice(manifest, (range(manifest.features),))
    if not names:
        return everything
    raw = RawColumns.of(manifest)
    positions = sorted({_position(raw, name) for name in names})
    if len(positions) == raw.count:
        return everything
    runs = merged(raw.features(position) for position in positions)
    narrow = replace(
        manifest,
        features=sum(len(run) for run in runs),
        columns=tuple(raw.column(position) for position in positions),
        statistics=_of_features(manifest, runs),
    )
    return Choice(narrow, runs)


def merged(ranges: Iterable[range]) -> tuple[range, ...]:
    """Rising ranges with those that touch made one, and empty ones left out."""
    found: list[range] = []
    for each in ranges:
        if found and found[-1].stop == each.start:
            found[-1] = range(found[-1].start, each.stop)
        elif each:
            found.append(each)
    return tuple(found)


def _position(raw: RawColumns, name: str) -> int:
    position = raw.position(name)
    if position is None:
        raise InvalidArgument(f"the data set has no column {name!r}")
    return position


def _of_features(manifest: DatasetManifest, runs: Sequence[range]) -> Statistics:
    whole = manifest.statistics
    if len(whole.mean) != manifest.features:
        return Statistics(whole.count)

    def picked(values: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(value for run in runs for value in values[run.start : run.stop])

    return Statistics(
        count=whole.count,
        mean=picked(whole.mean),
        std=picked(whole.std),
        minimum=picked(whole.minimum),
        maximum=picked(whole.maximum),
    )
