"""Rows of a table as what chunks hold; the one path from a table's cells to their bytes."""

from collections.abc import Iterator, Sequence
from typing import Any

from numpy.typing import NDArray

from phalanx.data.manifest import Column
from phalanx.data.preprocess import Encoder
from phalanx.data.sources import TableBatch
from phalanx.data.targets import Target, TargetEncoder


class TableEncoder:
    """Encodes batches of a table row by row: how they are cut does not show in the result."""

    def __init__(
        self, columns: Sequence[Column], target: Target, trim_labels: str, dtype: str
    ) -> None:
        self._names = [column.name for column in columns]
        self._features = Encoder(columns, dtype)
        self._targets = TargetEncoder(target, trim_labels)

    @property
    def width(self) -> int:
        """How many features a row has."""
        return self._features.width

    @property
    def target_dtype(self) -> str:
        """The type of encoded targets."""
        return self._targets.dtype

    def remarks(self) -> tuple[str, ...]:
        """A sentence for each oddity met so far."""
        return self._features.remarks()

    def pieces(self, batch: TableBatch) -> Iterator[tuple[slice, NDArray[Any], NDArray[Any]]]:
        """Which rows of the batch, their features and their targets, in pieces that stay small.

        Raises InvalidArgument with the place of a cell that has no meaning.
        """
        targets = self._targets.encode(batch.columns[self._targets.target.name], batch.where)
        first = 0
        for features in self._features.encode(
            [batch.columns[name] for name in self._names], batch.where
        ):
            rows = slice(first, first + len(features))
            yield rows, features, targets[rows]
            first = rows.stop
