"""Messages as the JSON of ``--json``: protobuf's JSON with two differences.

Names are snake_case and 64-bit integers are numbers. As in protobuf's JSON enums are their names,
times are RFC 3339, durations ``1.5s``, and numbers that JSON cannot write are ``"NaN"`` and
``"Infinity"``. Plain fields are always there; messages, members of a oneof and optional fields only
when set.
"""

import base64
import math
from collections.abc import Mapping
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]

_WELL_KNOWN = "google.protobuf."
_WHOLE_EXACT = 2**53


def message_to_json(message: Message) -> dict[str, Json]:
    """Return a message as JSON values."""
    result: dict[str, Json] = {}
    for field in message.DESCRIPTOR.fields:
        if field.is_repeated or not field.has_presence or message.HasField(field.name):
            result[field.name] = _field(field, getattr(message, field.name))
    return result


def _field(field: Any, value: Any) -> Json:
    if not field.is_repeated:
        return _single(field, value)
    if isinstance(value, Mapping):
        value_field = field.message_type.fields_by_name["value"]
        return {str(key): _single(value_field, value[key]) for key in sorted(value)}
    return [_single(field, item) for item in value]


def _single(field: Any, value: Any) -> Json:
    if field.message_type is not None:
        if field.message_type.full_name.startswith(_WELL_KNOWN):
            known: Json = MessageToDict(value)  # a string for times, plain values for Struct
            return _whole(known)
        return message_to_json(value)
    if field.enum_type is not None:
        named = field.enum_type.values_by_number.get(value)
        return named.name if named is not None else int(value)
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    plain: Json = value
    return plain


def _whole(value: Json) -> Json:
    """Return free values by name, as protobuf has them in no order, with whole numbers as people
    write them: 1 is not always the same as 1.0 when it is read again."""
    if isinstance(value, dict):
        return {name: _whole(value[name]) for name in sorted(value)}
    if isinstance(value, list):
        return [_whole(each) for each in value]
    if isinstance(value, float) and value.is_integer() and abs(value) <= _WHOLE_EXACT:
        return int(value)
    return value
