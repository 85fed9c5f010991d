"""What a file format gives to ingestion: passes over batches of named columns or of arrays."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from phalanx.data.manifest import ColumnKind, SourceFile
from phalanx.data.preprocess import ColumnValues, Whereabouts

TARGET = "target"
"""What the target of array data is called."""


@dataclass(frozen=True)
class TableBatch:
    """Some rows of a table: the wanted columns by name, and where its cells came from."""

    rows: int
    columns: Mapping[str, ColumnValues]
    where: Whereabouts


@dataclass(frozen=True)
class ArrayBatch:
    """Some rows of array data: rows by features, dense or CSR, and their targets."""

    features: Any
    targets: ColumnValues
    where: Whereabouts

    @property
    def rows(self) -> int:
        """How many rows."""
        return int(self.features.shape[0])


@dataclass(frozen=True)
class TableShape:
    """The columns of a table in order, what they hold, and which of them are true-or-false.

    Those ``left_out`` are no features, as if it had been said to ignore them.
    """

    names: tuple[str, ...]
    kinds: Mapping[str, ColumnKind]
    booleans: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()
    left_out: frozenset[str] = frozenset()


class TableSource(Protocol):
    """A table that can be read from the start any number of times in bounded memory."""

    @property
    def shape(self) -> TableShape:
        """Its columns."""
        ...

    @property
    def present(self) -> tuple[str, ...]:
        """Names of all columns that are there, wanted or not."""
        ...

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """Where it comes from."""
        ...

    def batches(self, wanted: Mapping[str, ColumnKind]) -> Iterator[TableBatch]:
        """All rows in order, the wanted columns as what they are wanted as.

        Raises InvalidArgument, naming file and place, for a column that is not there and a cell
        that is not what it should be.
        """
        ...


@dataclass(frozen=True)
class ArrayShape:
    """What array data is before a pass over it.

    ``features`` is None where only a pass tells. ``whole_bytes``: every feature fits a byte.
    ``labels``: the targets are classes by the nature of the format. ``names`` of the features, if
    they have any.
    """

    features: int | None
    sparse: bool = False
    whole_bytes: bool = False
    labels: bool = False
    boolean_target: bool = False
    names: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())


class ArraySource(Protocol):
    """Array data that can be read from the start any number of times in bounded memory."""

    @property
    def shape(self) -> ArrayShape:
        """What the arrays are."""
        ...

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """Where it comes from."""
        ...

    def batches(self) -> Iterator[ArrayBatch]:
        """All rows in order; raises InvalidArgument naming file and place."""
        ...


Source = TableSource | ArraySource


@dataclass(frozen=True)
class Opened:
    """What the given paths hold: the data, and a test split where the format brings one."""

    main: Source
    test: Source | None = None
