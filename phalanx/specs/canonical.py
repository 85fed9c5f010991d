"""Specs as JSON, and their hash: SHA-256 over RFC 8785 canonical JSON.

Names are snake_case, 64-bit integers are numbers (validation keeps them below 2^53), durations are
strings such as `1.5s`, whole numbers of free-form arguments stay whole.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from phalanx.errors import InvalidArgument
from phalanx.v1 import job_spec_pb2

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]


def to_json(message: Message) -> dict[str, Json]:
    """Return a message as plain JSON values: the fields that are set, by their proto names."""
    result: dict[str, Json] = {}
    for field, value in message.ListFields():
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            inner = field.message_type.fields_by_name["value"]
            result[field.name] = {str(key): _value(inner, value[key]) for key in value}
        elif field.is_repeated:
            result[field.name] = [_value(field, item) for item in value]
        else:
            result[field.name] = _value(field, value)
    return result


def struct_to_python(struct: Message) -> dict[str, Any]:
    """Return a `google.protobuf.Struct` as Python values in which whole numbers are ints."""
    return {key: _free(value) for key, value in sorted(struct.fields.items())}  # type: ignore[attr-defined]


def canonical_json(value: Json) -> str:
    """Return the RFC 8785 form of a JSON value. Raises InvalidArgument for non-finite numbers."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, int | float):
        return _number(value)
    if isinstance(value, Mapping):
        # The order is that of UTF-16 code units, not of code points.
        keys = sorted(value, key=lambda key: key.encode("utf-16-be", "surrogatepass"))
        return "{" + ",".join(f"{canonical_json(k)}:{canonical_json(value[k])}" for k in keys) + "}"
    if isinstance(value, Sequence):
        return "[" + ",".join(canonical_json(item) for item in value) + "]"
    raise TypeError(f"{type(value).__name__} is not JSON")


def spec_sha256(spec: job_spec_pb2.JobSpec) -> str:
    """Return the hash of a resolved spec: lower-case hexadecimal SHA-256 of its canonical JSON."""
    return hashlib.sha256(canonical_json(to_json(spec)).encode()).hexdigest()


def format_duration(seconds: int, nanos: int) -> str:
    """Return a duration as protobuf's JSON writes it: `90s`, `1.5s`."""
    sign = "-" if seconds < 0 or nanos < 0 else ""
    fraction = f".{abs(nanos):09d}".rstrip("0") if nanos else ""
    return f"{sign}{abs(seconds)}{fraction}s"


def _value(field: FieldDescriptor, value: Any) -> Json:
    if field.message_type is None:
        if field.enum_type is not None:
            return str(field.enum_type.values_by_number[value].name)
        return value  # type: ignore[no-any-return]
    kind = field.message_type.full_name
    if kind == "google.protobuf.Duration":
        return format_duration(value.seconds, value.nanos)
    if kind == "google.protobuf.Struct":
        return struct_to_python(value)
    if kind == "google.protobuf.ListValue":
        return [_free(item) for item in value.values]
    return to_json(value)


def _free(value: Any) -> Any:
    kind = value.WhichOneof("kind")
    if kind == "struct_value":
        return struct_to_python(value.struct_value)
    if kind == "list_value":
        return [_free(item) for item in value.list_value.values]
    if kind == "number_value":
        number = value.number_value
        return int(number) if number.is_integer() and abs(number) <= 2**53 else number
    return None if kind in (None, "null_value") else getattr(value, kind)


def _number(value: float) -> str:
    """A number as ECMAScript prints it (RFC 8785, section 3.2.2.3)."""
    if isinstance(value, int):
        if abs(value) <= 2**53:
            return str(value)
        value = float(value)
    if not math.isfinite(value):
        raise InvalidArgument(f"{value} has no JSON form; numbers must be finite")
    if value == 0:
        return "0"
    sign = "-" if value < 0 else ""
    mantissa, _, exponent = f"{abs(value)!r}".partition("e")
    whole, _, fraction = mantissa.partition(".")
    fraction = "" if fraction == "0" else fraction
    digits = (whole + fraction).lstrip("0")
    # The decimal point stands `point` digits from the left of `digits`.
    point = len(whole) + int(exponent or 0) - (len(whole + fraction) - len(digits))
    digits = digits.rstrip("0")
    return sign + _place_point(digits, point)


def _place_point(digits: str, point: int) -> str:
    count = len(digits)
    if count <= point <= 21:
        return digits + "0" * (point - count)
    if 0 < point <= 21:
        return f"{digits[:point]}.{digits[point:]}"
    if -6 < point <= 0:
        return "0." + "0" * -point + digits
    exponent = point - 1
    fraction = f".{digits[1:]}" if count > 1 else ""
    return f"{digits[0]}{fraction}e{'+' if exponent > 0 else '-'}{abs(exponent)}"
