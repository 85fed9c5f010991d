"""Reading and writing fields of a spec by their path."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from phalanx.specs.tree import join, join_key


def is_set(message: Message, path: str) -> bool:
    """Return whether the field at `path` (dots, no lists) is given or differs from its default."""
    return bool(lookup(message, path))


def lookup(message: Message, path: str) -> list[Any]:
    """Return the value at `path` as a list of one, or nothing where it is not set.

    A repeated field gives all its values.
    """
    current: Any = message
    names = path.split(".")
    for index, name in enumerate(names):
        field = current.DESCRIPTOR.fields_by_name[name]
        if field.is_repeated:
            return list(getattr(current, name)) if index == len(names) - 1 else []
        if field.has_presence and not current.HasField(name):
            return []
        current = getattr(current, name)
    if (
        not isinstance(current, Message)
        and not field.has_presence
        and current == field.default_value
    ):
        return []
    return [current]


LONG_LISTS = frozenset(("tasks.arguments",))
"""Fields with so many messages that walking through them would hold everything else up."""


def walk(message: Message, path: str = "") -> Iterator[tuple[str, FieldDescriptor, Any]]:
    """Yield (path, field, value) of every set field, messages before their members.

    What is in `LONG_LISTS` is left out: whoever knows the field checks it.
    """
    for field, value in message.ListFields():
        place = join(path, field.name)
        if place in LONG_LISTS:
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            inner = field.message_type.fields_by_name["value"]
            for key in value:
                yield join_key(place, str(key)), inner, value[key]
                if inner.message_type is not None:
                    yield from walk(value[key], join_key(place, str(key)))
        elif field.is_repeated:
            for index, item in enumerate(value):
                yield f"{place}[{index}]", field, item
                if field.message_type is not None:
                    yield from walk(item, f"{place}[{index}]")
        else:
            yield place, field, value
            if field.message_type is not None:
                yield from walk(value, place)


def fields_of(message: Message) -> list[FieldDescriptor]:
    """Return the fields that the message's type has, in the order of the `.proto`."""
    return list(message.DESCRIPTOR.fields)  # type: ignore[arg-type]


def unknown_numbers(message: Message) -> list[tuple[str, int]]:
    """Return (path, field number) of every field that this version does not know."""
    found = [("", each.field_number) for each in UnknownFieldSet(message)]  # type: ignore[attr-defined]
    for path, field, value in walk(message):
        if field.message_type is not None:
            found += [(path, each.field_number) for each in UnknownFieldSet(value)]  # type: ignore[attr-defined]
    return found
