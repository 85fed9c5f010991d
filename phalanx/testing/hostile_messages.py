"""Messages that no honest client sends: drawn from descriptors, with a seed.

    messages = HostileMessages(Random(7), words=["digits", "job-1"])
    for method in methods_of("phalanx/v1/job_service.proto"):
        data = messages.request(method.input_type)         # bytes, as they go over the wire

Most are well formed and wrong in some fields only, since what is refused at the door tests nothing
behind it. What a program adds later, be it a field, a message or a method, is drawn as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from random import Random
from typing import Any

from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message

DEPTH_MAX = 5
LONG = 20_000
"""Characters or bytes of what is long; a few of them fit into a message."""
TIDY_SHARE = 0.75
"""So many values are such as an honest client could send."""

EDGES = (0, 1, -1, 2, 3, 7, 100, 65_536, 2**31 - 1, -(2**31), 2**32 - 1, 2**53 + 1)
EDGES_OF_64_BITS = (2**63 - 1, -(2**63), 2**64 - 1, 2**40)
REALS = (0.0, -0.0, 0.5, 1.0, -1.0, 1e-300, 5e-324, 1e38, 1e308, math.inf, -math.inf, math.nan)
TEXTS = (
    "",
    " ",
    "a",
    "0",
    "-1",
    "nan",
    "null",
    "@",
    "/",
    "a/b",
    "a@1",
    "a@99999999999999999999",
    "default/",
    "..",
    "../../etc/passwd",
    "/etc/passwd",
    "a\0b",
    "a\nb",
    "%s%n{0}{x!r}",
    "\u202etxt",
    "\ufeff",
    "\U0010ffff",
    "é" * 40,
    "a" * 300,
    "f" * 64,
    "{}",
    "[]",
    '{"a": NaN}',
    "[" * 3000,
    "a" * LONG,
)
SIZES = {
    FieldDescriptor.TYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_SINT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_SFIXED32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_ENUM: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.TYPE_FIXED32: (0, 2**32 - 1),
    FieldDescriptor.TYPE_UINT64: (0, 2**64 - 1),
    FieldDescriptor.TYPE_FIXED64: (0, 2**64 - 1),
}
_64_BITS = (-(2**63), 2**63 - 1)


def methods_of(*files: str) -> list[MethodDescriptor]:
    """Return the methods of all services in files that are named as they are imported."""
    pool = descriptor_pool.Default()
    return [
        method
        for file in files
        for service in pool.FindFileByName(file).services_by_name.values()
        for method in service.methods
    ]


class HostileMessages:
    """Draws requests. `words` are names that mean something to the server; `samples` are requests
    that it takes, by the full name of their type, of which some are changed in a few places."""

    def __init__(
        self,
        chance: Random,
        words: Iterable[str] = (),
        samples: Mapping[str, Sequence[Message]] | None = None,
    ) -> None:
        self.chance = chance
        self.words = list(words)
        self.samples = dict(samples or {})

    def request(self, kind: Descriptor) -> bytes:
        """Return what is sent as one request; in one of eight cases it is no such message."""
        data = self.message(kind).SerializeToString()
        if self.chance.random() < 0.875:
            return data
        return self.garbled(data)

    def message(self, kind: Descriptor) -> Message:
        """Return a message that can be read."""
        samples = self.samples.get(kind.full_name)
        if samples and self.chance.random() < 0.6:
            made: Message = message_factory.GetMessageClass(kind)()
            made.CopyFrom(self.chance.choice(samples))
            for _ in range(self.chance.choice((0, 1, 1, 1, 2, 3))):
                self.change(made)
            return made
        return self._drawn(kind, 0)

    def change(self, message: Message) -> None:
        """Change one field, of the message or of one inside of it."""
        fields: list[Any] = list(message.DESCRIPTOR.fields)
        if not fields:
            return
        there = [each for each, _ in message.ListFields() if _holds_messages(each)]
        if there and self.chance.random() < 0.75:
            field = self.chance.choice(there)
            held: Any = getattr(message, field.name)
            inside = list(held) if field.is_repeated else [held]
            self.change(self.chance.choice(inside))
            return
        field = self.chance.choice(fields)
        if self.chance.random() < 0.2:
            message.ClearField(field.name)
        else:
            self._set(message, field, 1)

    def garbled(self, data: bytes) -> bytes:
        """Return bytes that are no message, or one by accident."""
        chance = self.chance
        kind = chance.randrange(6)
        if kind == 0:
            return chance.randbytes(chance.choice((1, 3, 40, 5000)))
        if kind == 1:
            return data[: chance.randrange(len(data) + 1)]
        if kind == 2 and data:
            changed = bytearray(data)
            for _ in range(chance.choice((1, 1, 2, 8))):
                changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
            return bytes(changed)
        if kind == 3:
            # A field that nobody knows, and one whose length goes on beyond the end.
            return data + chance.choice((b"\xfa\xff\x03\x02hi", b"\x0a\xff\xff\xff\xff\x0f"))
        if kind == 4:
            # Texts that are none.
            return data.replace(b"a", b"\xff").replace(b"e", b"\xc3")
        return b"\x0a\x80" * chance.choice((1, 100, 5000))

    # -- messages

    def _drawn(self, kind: Descriptor, depth: int) -> Message:
        made: Message = message_factory.GetMessageClass(kind)()
        for field in self._chosen(kind, depth):
            self._set(made, field, depth)
        return made

    def _chosen(self, kind: Descriptor, depth: int) -> list[FieldDescriptor]:
        """Fields that are set: of each oneof one at most."""
        share = self.chance.choice((0.3, 0.7, 1.0)) if depth < 2 else 0.4
        chosen = [
            each
            for each in kind.fields
            if each.containing_oneof is None and self.chance.random() < share
        ]
        chosen += [
            self.chance.choice(choice.fields)
            for choice in kind.oneofs
            if self.chance.random() < max(share, 0.7)
        ]
        return chosen

    def _set(self, message: Message, field: FieldDescriptor, depth: int) -> None:
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            self._fill_map(message, field, depth)
        elif field.is_repeated:
            message.ClearField(field.name)
            held: Any = getattr(message, field.name)
            for _ in range(self._count(depth)):
                if field.message_type is not None:
                    held.append(self._inner(field.message_type, depth))
                else:
                    held.append(self._value(field))
        elif field.message_type is not None:
            getattr(message, field.name).CopyFrom(self._inner(field.message_type, depth))
            if self.chance.random() < 0.1:
                message.ClearField(field.name)
                getattr(message, field.name).SetInParent()
        else:
            setattr(message, field.name, self._value(field))

    def _fill_map(self, message: Message, field: FieldDescriptor, depth: int) -> None:
        assert field.message_type is not None
        key, value = (field.message_type.fields_by_name[each] for each in ("key", "value"))
        held: Any = getattr(message, field.name)
        for _ in range(self._count(depth)):
            name = self._value(key)
            if value.message_type is not None:
                held[name].CopyFrom(self._inner(value.message_type, depth))
            else:
                held[name] = self._value(value)

    def _inner(self, kind: Descriptor, depth: int) -> Message:
        if depth < DEPTH_MAX:
            return self._drawn(kind, depth + 1)
        made: Message = message_factory.GetMessageClass(kind)()
        if depth == DEPTH_MAX and self.chance.random() < 0.05:
            self._nest(made)
        return made

    def _nest(self, message: Message) -> None:
        """Put a message into one of its own kind, as deep as can be read, where it has one."""
        for _ in range(60):
            fields: list[Any] = list(message.DESCRIPTOR.fields)
            again = next((each for each in fields if _recurs(each)), None)
            if again is None:
                return
            held: Any = getattr(message, again.name)
            if again.is_repeated:
                message = held.add()
            else:
                held.SetInParent()
                message = held

    def _count(self, depth: int) -> int:
        few = (0, 1, 1, 2, 3)
        return self.chance.choice(few if depth else (*few, *few, 200))

    # -- values

    def _value(self, field: FieldDescriptor) -> Any:
        match field.type:
            case FieldDescriptor.TYPE_BOOL:
                return self.chance.random() < 0.5
            case FieldDescriptor.TYPE_BYTES:
                return self._bytes()
            case FieldDescriptor.TYPE_STRING:
                return self._text()
            case FieldDescriptor.TYPE_DOUBLE | FieldDescriptor.TYPE_FLOAT:
                return self._real(field)
            case FieldDescriptor.TYPE_ENUM:
                return self._chosen_enum(field)
        return self._whole(field)

    def _whole(self, field: FieldDescriptor) -> int:
        low, high = SIZES.get(field.type, _64_BITS)
        if self.chance.random() < TIDY_SHARE:
            return max(low, self.chance.choice((0, 1, 1, 2, 3, 8, 16, 64)))
        edges = EDGES if high < 2**40 else (*EDGES, *EDGES_OF_64_BITS)
        return int(min(high, max(low, self.chance.choice((*edges, low, high)))))

    def _chosen_enum(self, field: FieldDescriptor) -> int:
        assert field.enum_type is not None
        if self.chance.random() < TIDY_SHARE:
            return int(self.chance.choice(field.enum_type.values).number)
        return self._whole(field)

    def _real(self, field: FieldDescriptor) -> float:
        if self.chance.random() < TIDY_SHARE:
            return self.chance.random()
        value = self.chance.choice(REALS)
        small = field.type == FieldDescriptor.TYPE_FLOAT
        return value if not small or abs(value) < 1e38 or math.isinf(value) else 1e38

    def _text(self) -> str:
        if self.words and self.chance.random() < TIDY_SHARE:
            return self.chance.choice(self.words)
        return self.chance.choice(TEXTS)

    def _bytes(self) -> bytes:
        kind = self.chance.randrange(4)
        if kind == 0:
            return self.chance.randbytes(self.chance.choice((0, 1, 8, 64, 512, LONG)))
        if kind == 1:
            return bytes(self.chance.choice((1, 4, 64, 4096)))
        if kind == 2:
            return self.chance.choice((b"\xff" * 8, b"\x01", b"\x0a\x80" * 50, b"[" * 3000))
        return self._text().encode()


def _holds_messages(field: FieldDescriptor) -> bool:
    return field.message_type is not None and not field.message_type.GetOptions().map_entry


def _recurs(field: FieldDescriptor) -> bool:
    """Whether a message of this field can hold one of its own kind, itself or one level further."""
    kind = field.message_type
    if kind is None or not _holds_messages(field):
        return False
    inner = [each.message_type for each in kind.fields if each.message_type is not None]
    return kind in inner or any(each.message_type is kind for one in inner for each in one.fields)
