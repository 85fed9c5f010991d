"""The tree of a parsed text with the line of every value; nothing is known about fields yet."""

from __future__ import annotations

from dataclasses import dataclass, field

from phalanx.errors import InvalidArgument, Violation

TEXT_LIMIT_BYTES = 1024 * 1024
"""A job file is small: its source code may be 256 KiB; anything above this is a mistake."""

NODE_LIMIT = 100_000
DEPTH_LIMIT = 64

NO_LINE = 0
"""The line of what does not stand in the text."""

Scalar = str | int | float | bool | None


@dataclass(frozen=True)
class Entry:
    """One `key: value` of a mapping; `line` is where the key stands."""

    key: str
    line: int
    value: Node


@dataclass(frozen=True)
class Node:
    """A value: a mapping (`entries`), a sequence (`items`) or a scalar.

    `bare` marks a null that nobody wrote (`key:` with nothing behind it).
    """

    line: int
    kind: str
    scalar: Scalar = None
    entries: tuple[Entry, ...] = ()
    items: tuple[Node, ...] = ()
    bare: bool = False

    def describe(self) -> str:
        """Return what it is, in words for an error message."""
        if self.kind == "mapping":
            return "a mapping"
        if self.kind == "sequence":
            return "a list"
        if self.scalar is None:
            return "nothing" if self.bare else "null"
        if isinstance(self.scalar, bool):
            return f"the truth value {str(self.scalar).lower()}"
        if isinstance(self.scalar, str):
            return f"the text {_shorten(self.scalar)!r}"
        return f"the number {self.scalar}"


@dataclass
class Problems:
    """Collects everything that is wrong with one text."""

    source: str
    violations: list[Violation] = field(default_factory=list)

    def add(self, path: str, message: str, line: int | None) -> None:
        """Note one wrong field."""
        self.violations.append(Violation(path, message, line or None))

    def raise_if_any(self) -> None:
        """Raise InvalidArgument with all of them, in the order of the text."""
        if not self.violations:
            return
        ordered = sorted(self.violations, key=lambda each: (each.line is None, each.line or 0))
        raise invalid_text(self.source, ordered)


HALF_CHARACTER = "holds half of a surrogate pair, which is no character"


def is_unicode(text: str) -> bool:
    """Say whether a text can be written down: escapes can also name half of a surrogate pair."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def invalid_text(source: str, violations: list[Violation]) -> InvalidArgument:
    """Return the error for a text with these wrong fields."""
    first = violations[0]
    place = source if first.line is None else f"{source}:{first.line}"
    where = f"{place}: {first.field}: " if first.field else f"{place}: "
    more = len(violations) - 1
    rest = "" if more == 0 else f" (and {more} more)"
    return InvalidArgument(
        f"{where}{first.message}{rest}", reason="SPEC_INVALID", violations=violations
    )


def join(path: str, name: str) -> str:
    """Return the path of a member of `path`."""
    return f"{path}.{name}" if path else name


def join_key(path: str, key: str) -> str:
    """Return the path of a map entry; odd keys are quoted."""
    plain = key.replace("_", "").replace("-", "").isalnum()
    return join(path, key) if plain else f'{path}["{key}"]'


def _shorten(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."
