"""What speaks against taking the words of a column for categories, or for classes."""

import functools
from collections.abc import Callable, Collection, Iterable, Sequence

import numpy as np

from phalanx.data.arrow_values import NUMBER_RULE, is_number, is_number_elsewhere
from phalanx.data.preprocess import TextValues, Whereabouts
from phalanx.errors import InvalidArgument

HOLDS_NUL = (
    "holds a NUL, which no text does; is the file damaged, or text of another encoding than UTF-8?"
)


def refuse_names(names: Iterable[str]) -> None:
    """Raises InvalidArgument for a name of a column that holds a NUL."""
    for name in names:
        if "\0" in name:
            raise InvalidArgument(f"the column name {name!r} {HOLDS_NUL}")


class Doubts:
    """Looks at the words of one column, batch by batch.

    Numbers that are written in another way (``1,5``, ``1,003``) are words, and each of them would
    silently become a category of its own. A NUL is a part of no text: the file is damaged, or
    written in another encoding.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._number = ""
        self._place: Callable[[], str] | None = None

    def look(self, values: TextValues, where: Whereabouts) -> None:
        """Some rows; raises InvalidArgument, with its place, for a word that holds a NUL."""
        row = _first_row(values, [index for index, word in enumerate(values.words) if "\0" in word])
        if row is not None:
            raise InvalidArgument(
                f"{where(row, self._name)}: {_word(values, row)!r} {HOLDS_NUL}",
                reason="BAD_CELL",
            )
        if self._place is None:
            row = _first_row(
                values,
                [index for index, word in enumerate(values.words) if is_number_elsewhere(word)],
            )
            if row is not None:
                self._number = _word(values, row)
                self._place = functools.partial(where, row, self._name)

    def refuse_numbers(self, words: Collection[str], otherwise: str) -> None:
        """Raises InvalidArgument where most of the different words are meant as numbers.

        ``otherwise`` is what to say if they are not.
        """
        if self._place is None:
            return
        numbers = sum(is_number(word) or is_number_elsewhere(word) for word in words)
        if 2 * numbers > len(words):
            raise InvalidArgument(
                f"{self._place()}: {self._number!r} looks like a number, as most of the column "
                f"does, but {NUMBER_RULE}; convert them first (pandas.read_csv takes decimal=',' "
                f"or thousands=','), or say {otherwise} if they are none",
                reason="BAD_CELL",
            )


def _first_row(values: TextValues, indices: Sequence[int]) -> int | None:
    """The first row that has one of these words."""
    found = np.isin(values.codes, indices) if indices else np.zeros(0, dtype=bool)
    return int(found.argmax()) if found.any() else None


def _word(values: TextValues, row: int) -> str:
    return values.words[int(values.codes[row])]
