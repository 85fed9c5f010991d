"""Arrow columns as raw values."""

import math
from collections.abc import Collection
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from phalanx.data.manifest import ColumnKind
from phalanx.data.preprocess import MISSING, NumericValues, TextValues


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


def _as_text(array: Any) -> Any:
    """Numbers as words: whole ones without a point, so that 3 and 3.0 are one category."""
    if pa.types.is_floating(array.type) or pa.types.is_decimal(array.type):
        words = [
            None
            if value is None or math.isnan(value)
            else (str(int(value)) if value == int(value) else repr(float(value)))
            for value in array.to_pylist()
        ]
        return pa.array(words, pa.string())
    return array.cast(pa.string())
