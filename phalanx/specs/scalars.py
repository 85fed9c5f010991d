"""Scalars of a text to values of a field, each with a message that says how to write it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from decimal import Decimal

from google.protobuf.descriptor import FieldDescriptor

from phalanx.specs.tree import Node

Value = str | int | float | bool | bytes

_WHOLE_BOUNDS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
_UNIT_NANOS = {
    "ns": 1,
    "us": 10**3,
    "ms": 10**6,
    "s": 10**9,
    "m": 60 * 10**9,
    "h": 3600 * 10**9,
    "d": 86400 * 10**9,
}
_DURATION = re.compile(r"(-)?((?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:ns|us|ms|s|m|h|d))+")
_DURATION_PART = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(ns|us|ms|s|m|h|d)")
DURATION_LIMIT_S = 315_576_000_000


class WrongValue(ValueError):
    """The scalar does not fit the field; the text says why and how to write it."""


def convert(node: Node, field: FieldDescriptor) -> Value:
    """Return the field's value for a scalar node. Raises WrongValue."""
    return _CONVERTERS[field.cpp_type](node, field)


def parse_duration_nanos(text: str) -> int:
    """Return the nanoseconds of `30m`, `1.5s`, `2h`, `1h30m`, `250ms`. Raises WrongValue."""
    if not _DURATION.fullmatch(text):
        raise WrongValue(f"{text!r} is not a duration; write a number and a unit, as 30s, 1.5m, 2h")
    total = Decimal(0)
    for number, unit in _DURATION_PART.findall(text):
        total += Decimal(number) * _UNIT_NANOS[unit]
    nanos = int(total)
    if nanos > DURATION_LIMIT_S * 10**9:
        raise WrongValue(f"{text!r} is longer than any duration can be (10,000 years)")
    return -nanos if text.startswith("-") else nanos


def _whole(node: Node, field: FieldDescriptor) -> int:
    value = node.scalar
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,20}", value):
        value = int(value)  # the JSON of 64-bit integers is a string
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise WrongValue(f"expected a whole number, found {node.describe()}")
    lowest, highest = _WHOLE_BOUNDS[field.cpp_type]
    if not lowest <= value <= highest:
        raise WrongValue(f"{value} is out of range; allowed are {lowest} to {highest}")
    return value


def _number(node: Node, _: FieldDescriptor) -> float:
    value = node.scalar
    if isinstance(value, str) and value in ("NaN", "Infinity", "-Infinity"):
        return float(value)  # as JSON writes them; refused by validation, with its reason
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise WrongValue(f"expected a number, found {node.describe()}")
    try:
        return float(value)
    except OverflowError:
        raise WrongValue(f"{value} is too large for a number") from None


def _truth(node: Node, _: FieldDescriptor) -> bool:
    if not isinstance(node.scalar, bool):
        raise WrongValue(f"expected true or false, found {node.describe()}")
    return node.scalar


def _text(node: Node, _: FieldDescriptor) -> str:
    if not isinstance(node.scalar, str):
        raise WrongValue(f"expected text, found {node.describe()}; put it in quotes")
    if any(0xD800 <= ord(character) <= 0xDFFF for character in node.scalar):
        raise WrongValue("the text holds half of a surrogate pair, which is not valid Unicode")
    return node.scalar


_CONVERTERS: dict[int, Callable[[Node, FieldDescriptor], Value]] = {
    FieldDescriptor.CPPTYPE_INT32: _whole,
    FieldDescriptor.CPPTYPE_INT64: _whole,
    FieldDescriptor.CPPTYPE_UINT32: _whole,
    FieldDescriptor.CPPTYPE_UINT64: _whole,
    FieldDescriptor.CPPTYPE_DOUBLE: _number,
    FieldDescriptor.CPPTYPE_FLOAT: _number,
    FieldDescriptor.CPPTYPE_BOOL: _truth,
    FieldDescriptor.CPPTYPE_STRING: _text,
}
