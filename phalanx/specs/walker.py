"""A tree to a message, by walking the message's descriptor: no table of fields to keep in step.

Protobuf's own `ParseDict` stops at the first error and knows no lines; this names everything that
is wrong at once.
"""

from __future__ import annotations

import difflib
import math
import re
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from phalanx.specs import scalars
from phalanx.specs.fields import fields_of
from phalanx.specs.tree import Node, Problems, join, join_key

_WHOLE_EXACT = 2**53

_COUNT_OR_PART = re.compile(
    r'(sweep\.(base\.|grid\["))?forest\b.*\bmax_features("\])?(\[[0-9]+\])?$'
)
"""Paths where scikit-learn takes 1 for one feature and 1.0 for all of them."""


class Walker:
    """Fills one message from a tree; remembers the line of every field it saw."""

    def __init__(self, problems: Problems) -> None:
        self._problems = problems
        self.lines: dict[str, int] = {}
        self.meant: set[str] = set()
        """Fields that unknown ones were probably meant to be."""

    def fill(self, message: Message, node: Node, path: str = "") -> None:
        """Set the fields of `message` from the mapping `node`."""
        if node.kind != "mapping":
            self._refuse_null_or(node, path, "a mapping of fields")
            return
        names = _field_names(message)
        members: dict[str, tuple[str, int]] = {}
        seen: dict[str, int] = {}
        for entry in node.entries:
            field = names.get(entry.key)
            if field is None:
                self._unknown(message, entry.key, path, entry.line)
                continue
            place = join(path, field.name)
            self.lines[place] = entry.line
            if field.name in seen:
                spelling = f"given twice, also on line {seen[field.name]}"
                self._problems.add(place, f"{spelling} with another spelling", entry.line)
                continue
            seen[field.name] = entry.line
            if self._clashes(field, members, path, entry.line):
                continue
            self._set(message, field, entry.value, place)

    def _unknown(self, message: Message, key: str, path: str, line: int) -> None:
        fields = fields_of(message)
        known = [field.name for field in fields]
        inside = [
            field.name
            for field in fields
            if field.message_type is not None and key in field.message_type.fields_by_name
        ]
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
        if inside:
            self.meant.add(join(join(path, inside[0]), key))
            hint = f"it belongs in {join(path, inside[0])}"
        elif close:
            self.meant.add(join(path, close[0]))
            hint = f"did you mean {close[0]}?"
        elif known:
            hint = f"known are: {', '.join(known)}"
        else:
            hint = "nothing is to be set here"
        self._problems.add(join_key(path, key), f"unknown field; {hint}", line)

    def _clashes(
        self, field: FieldDescriptor, members: dict[str, tuple[str, int]], path: str, line: int
    ) -> bool:
        """Whether another member of the field's choice (oneof) was given before."""
        choice = field.containing_oneof
        if choice is None or len(choice.fields) == 1:
            return False
        if choice.name not in members:
            members[choice.name] = (field.name, line)
            return False
        first, first_line = members[choice.name]
        where = f"on line {first_line}" if first_line else "by --set"
        self._problems.add(
            join(path, field.name),
            f"choose one {choice.name}: {first} is already given {where}",
            line,
        )
        return True

    def _set(self, message: Message, field: FieldDescriptor, node: Node, path: str) -> None:
        if _is_map(field):
            self._fill_map(getattr(message, field.name), field, node, path)
        elif field.is_repeated:
            self._fill_list(getattr(message, field.name), field, node, path)
        elif field.message_type is not None:
            target = getattr(message, field.name)
            target.SetInParent()
            self._fill_message(target, node, path, f"{field.name}: {{}}")
        else:
            value = self._scalar(field, node, path)
            if value is not None:
                setattr(message, field.name, value)

    def _fill_message(self, target: Any, node: Node, path: str, empty: str = "{}") -> None:
        kind = target.DESCRIPTOR.full_name
        if kind == "google.protobuf.Duration":
            self._duration(target, node, path)
        elif kind == "google.protobuf.Struct":
            if node.kind == "mapping":
                for entry in node.entries:
                    place = join_key(path, entry.key)
                    self._free_value(target.fields[entry.key], entry.value, place)
            else:
                self._refuse_null_or(node, path, "a mapping", empty)
        elif kind == "google.protobuf.ListValue":
            if node.kind == "sequence":
                for index, item in enumerate(node.items):
                    self._free_value(target.values.add(), item, f"{path}[{index}]")
            else:
                self._refuse_null_or(node, path, "a list", "[]")
        elif node.kind == "mapping":
            self.fill(target, node, path)
        else:
            self._refuse_null_or(node, path, "a mapping of fields", empty)

    def _fill_list(self, target: Any, field: FieldDescriptor, node: Node, path: str) -> None:
        if node.kind != "sequence":
            self._refuse_null_or(node, path, "a list", f"{field.name}: []")
            return
        for index, item in enumerate(node.items):
            place = f"{path}[{index}]"
            self.lines[place] = item.line
            if field.message_type is not None:
                self._fill_message(target.add(), item, place)
            else:
                value = self._scalar(field, item, place)
                if value is not None:
                    target.append(value)

    def _fill_map(self, target: Any, field: FieldDescriptor, node: Node, path: str) -> None:
        if node.kind != "mapping":
            self._refuse_null_or(node, path, "a mapping", f"{field.name}: {{}}")
            return
        assert field.message_type is not None
        value_field = field.message_type.fields_by_name["value"]
        for entry in node.entries:
            place = join_key(path, entry.key)
            self.lines[place] = entry.line
            if value_field.message_type is not None:
                self._fill_message(target[entry.key], entry.value, place)
            else:
                value = self._scalar(value_field, entry.value, place)
                if value is not None:
                    target[entry.key] = value

    def _scalar(self, field: FieldDescriptor, node: Node, path: str) -> scalars.Value | None:
        if node.kind != "scalar" or node.scalar is None:
            self._refuse_null_or(node, path, "one value")
            return None
        try:
            return scalars.convert(node, field)
        except scalars.WrongValue as error:
            self._problems.add(path, str(error), node.line)
            return None

    def _duration(self, target: Any, node: Node, path: str) -> None:
        if not isinstance(node.scalar, str):
            self._refuse_null_or(node, path, "a duration with its unit, as 30s, 1.5m or 2h")
            return
        try:
            nanos = scalars.parse_duration_nanos(node.scalar)
        except scalars.WrongValue as error:
            self._problems.add(path, str(error), node.line)
            return
        seconds, rest = divmod(abs(nanos), 10**9)
        sign = -1 if nanos < 0 else 1
        target.seconds, target.nanos = sign * seconds, sign * rest

    def _free_value(self, target: Any, node: Node, path: str) -> None:
        """Set a google.protobuf.Value: the arguments of user code, any shape."""
        if node.kind == "mapping":
            target.struct_value.SetInParent()
            for entry in node.entries:
                place = join_key(path, entry.key)
                self._free_value(target.struct_value.fields[entry.key], entry.value, place)
        elif node.kind == "sequence":
            target.list_value.SetInParent()
            for index, item in enumerate(node.items):
                self._free_value(target.list_value.values.add(), item, f"{path}[{index}]")
        elif node.scalar is None:
            if node.bare:
                self._refuse_null_or(node, path, "a value", "null")
            target.null_value = 0
        elif isinstance(node.scalar, bool):
            target.bool_value = node.scalar
        elif isinstance(node.scalar, str):
            target.string_value = node.scalar
        else:
            self._free_number(target, node, path)

    def _free_number(self, target: Any, node: Node, path: str) -> None:
        value = node.scalar
        assert isinstance(value, int | float)
        if isinstance(value, float) and not math.isfinite(value):
            self._problems.add(path, "must be a finite number", node.line)
        elif isinstance(value, float) and value == 1.0 and _COUNT_OR_PART.match(path):
            hint = "write all for all features, or 1 for one"
            self._problems.add(path, f"a message cannot tell 1.0 from 1; {hint}", node.line)
        elif isinstance(value, int) and abs(value) > _WHOLE_EXACT:
            hint = "put it in quotes and convert it in your code"
            self._problems.add(
                path, f"{value} is above 2^53 and would be rounded; {hint}", node.line
            )
        else:
            target.number_value = float(value)

    def _refuse_null_or(self, node: Node, path: str, expected: str, empty: str = "") -> None:
        if node.kind == "scalar" and node.scalar is None:
            hint = f"; write `{empty}` for one with defaults" if empty else ""
            advice = "remove the field to get its default"
            self._problems.add(path, f"{node.describe()} is given here; {advice}{hint}", node.line)
        else:
            self._problems.add(path, f"expected {expected}, found {node.describe()}", node.line)


def _field_names(message: Message) -> dict[str, FieldDescriptor]:
    """Every accepted spelling: the proto name and its camelCase."""
    names: dict[str, FieldDescriptor] = {}
    for field in fields_of(message):
        names[field.name] = field
        names[field.json_name] = field
    return names


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry
