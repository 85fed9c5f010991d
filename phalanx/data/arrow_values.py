"""Arrow columns as raw values."""

import math
import re
from collections.abc import Collection
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from phalanx.data.manifest import ColumnKind
from phalanx.data.preprocess import MISSING, NumericValues, TextValues, Whereabouts
from phalanx.errors import InvalidArgument

_NUMBER = re.compile(
    r"[ \t]*[+-]?(?:(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|inf(?:inity)?|nan)[ \t]*",
    re.ASCII | re.IGNORECASE,
)

# Between thousands stand blanks too: plain, no-break and narrow ones.
_DECIMAL_COMMA = r"(?:\d*|\d{1,3}(?:[. '\u00a0\u202f]\d{3})+),\d+(?:[eE][+-]?\d+)?"
_THOUSANDS = r"\d{1,3}(?:[, '\u00a0\u202f]\d{3})+(?:\.\d*)?"
_NUMBER_ELSEWHERE = re.compile(rf"[+-]?(?:{_DECIMAL_COMMA}|{_THOUSANDS})", re.ASCII)
NUMBER_RULE = "numbers have a decimal point here and nothing between thousands"


def kind_of(arrow_type: pa.DataType) -> ColumnKind | None:
    """What a typed column holds; None for what cannot be a feature (dates, lists, bytes, …)."""
    types = pa.types
    if (
        types.is_integer(arrow_type)
        or types.is_floating(arrow_type)
        or types.is_boolean(arrow_type)
        or types.is_decimal(arrow_type)
    ):
        return "numeric"
    value_type = arrow_type.value_type if types.is_dictionary(arrow_type) else arrow_type
    if (
        types.is_string(value_type)
        or types.is_large_string(value_type)
        or types.is_string_view(value_type)
    ):
        return "categorical"
    return None


def numeric_values(array: Any) -> NumericValues:
    """Numbers and booleans as float64; nulls become NaN."""
    if pa.types.is_boolean(array.type):
        array = array.cast(pa.int8())
    values: NDArray[np.float64] = array.cast(pa.float64(), safe=False).to_numpy(
        zero_copy_only=False
    )
    return NumericValues(values)


def text_values(array: Any, markers: Collection[str]) -> TextValues:
    """Text without surrounding blanks; nulls and what reads like a marker are missing."""
    if not pa.types.is_dictionary(array.type):
        kind = kind_of(array.type)
        array = (array if kind == "categorical" else _as_text(array)).dictionary_encode()
    raw_words = [None if word is None else word.strip() for word in array.dictionary.to_pylist()]
    words: list[str] = []
    position: dict[str | None, int] = {None: MISSING}
    position.update((marker, MISSING) for marker in markers)
    table = np.empty(len(raw_words) + 1, dtype=np.int32)
    for index, word in enumerate(raw_words):
        if word is not None and word not in position:
            position[word] = len(words)
            words.append(word)
        table[index] = position[word]
    table[-1] = MISSING
    indices = array.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    return TextValues(codes=table[indices], words=words)


def parsed_numbers(
    array: Any, markers: Collection[str], where: Whereabouts, column: str
) -> NumericValues:
    """Text as numbers; raises InvalidArgument, with its place, for text that is none."""
    text = text_values(array, markers)
    table: NDArray[np.float64] = np.full(len(text.words) + 1, np.nan)
    for index, word in enumerate(text.words):
        if not is_number(word):
            row = int((text.codes == index).argmax())
            raise InvalidArgument(
                f"{where(row, column)}: {word!r} is not a number{number_hint(word)}",
                reason="BAD_CELL",
            )
        table[index] = float(word)
    return NumericValues(table[text.codes])


def is_number(text: str) -> bool:
    """Whether the text is a number (``+1.5e3``, ``inf``, ``nan``; no ``1_000``, no ``0x10``)."""
    return _NUMBER.fullmatch(text) is not None


def is_number_elsewhere(text: str) -> bool:
    """Whether the text is a number with a decimal comma or separated thousands (``1,003``)."""
    return _NUMBER_ELSEWHERE.fullmatch(text) is not None


def number_hint(text: str) -> str:
    """How to write what is a number elsewhere, in brackets; else nothing."""
    return f" ({NUMBER_RULE})" if is_number_elsewhere(text) else ""


def as_word(cell: Any) -> str:
    """A cell as a category: whole numbers without a point, so that 3 and 3.0 are one."""
    if isinstance(cell, float | Decimal) and math.isfinite(cell) and cell == int(cell):
        return str(int(cell))
    return str(cell)


def _as_text(array: Any) -> Any:
    if pa.types.is_floating(array.type) or pa.types.is_decimal(array.type):
        cells = array.to_pylist()
        words = [None if cell is None or math.isnan(cell) else as_word(cell) for cell in cells]
        return pa.array(words, pa.string())
    return array.cast(pa.string())
