"""JSON text to a tree with lines (the standard parser knows the lines of errors only)."""

from __future__ import annotations

import re
from json import JSONDecodeError
from json.decoder import scanstring  # type: ignore[attr-defined]

from phalanx.specs.tree import (
    DEPTH_LIMIT,
    HALF_CHARACTER,
    TEXT_LIMIT_BYTES,
    Entry,
    Node,
    Problems,
    Scalar,
    is_unicode,
    join_key,
)

_SPACE = re.compile(r"[ \t\r\n]*")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_WORDS: dict[str, Scalar] = {"true": True, "false": False, "null": None}


def parse_json(text: str, problems: Problems) -> Node | None:
    """Return the tree of a JSON text, None where it is not valid JSON (noted in `problems`)."""
    if len(text.encode("utf-8", "surrogatepass")) > TEXT_LIMIT_BYTES:
        problems.add("", f"the text is longer than {TEXT_LIMIT_BYTES} bytes", None)
        return None
    parser = _Parser(text, problems)
    try:
        return parser.document()
    except JSONDecodeError as error:
        line = text.count("\n", 0, error.pos) + 1
        problems.add("", f"not valid JSON: {error.msg} at column {error.colno}", line)
        return None


class _Parser:
    def __init__(self, text: str, problems: Problems) -> None:
        self._text = text
        self._problems = problems
        self._at = 0
        self._line = 1
        self._counted = 0

    def document(self) -> Node:
        self._skip()
        root = self._value(0, "")
        self._skip()
        if self._at != len(self._text):
            raise self._error("unexpected text after the end")
        return root

    def _error(self, message: str) -> JSONDecodeError:
        return JSONDecodeError(message, self._text, self._at)

    def _skip(self) -> None:
        match = _SPACE.match(self._text, self._at)
        self._at = match.end() if match else self._at

    def _here(self) -> int:
        self._line += self._text.count("\n", self._counted, self._at)
        self._counted = self._at
        return self._line

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _value(self, depth: int, path: str) -> Node:
        if depth > DEPTH_LIMIT:
            raise self._error(f"nested deeper than {DEPTH_LIMIT} levels")
        line = self._here()
        first = self._peek()
        if first == "{":
            return Node(line, "mapping", entries=self._object(depth, path))
        if first == "[":
            return Node(line, "sequence", items=self._array(depth, path))
        if first == '"':
            return Node(line, "scalar", self._string())
        for word, value in _WORDS.items():
            if self._text.startswith(word, self._at):
                self._at += len(word)
                return Node(line, "scalar", value)
        number = _NUMBER.match(self._text, self._at)
        if number is None or len(number.group()) > 400:
            raise self._error("expected a value")
        self._at = number.end()
        whole = number.group(2) is None and number.group(3) is None
        return Node(line, "scalar", int(number.group()) if whole else float(number.group()))

    def _string(self) -> str:
        text, self._at = scanstring(self._text, self._at + 1, True)
        if not is_unicode(text):
            raise self._error(f"a text that {HALF_CHARACTER}")
        return str(text)

    def _object(self, depth: int, path: str) -> tuple[Entry, ...]:
        entries: dict[str, Entry] = {}
        self._at += 1
        self._skip()
        if self._peek() == "}":
            self._at += 1
            return ()
        while True:
            if self._peek() != '"':
                raise self._error("expected a name in double quotes")
            line = self._here()
            key = self._string()
            self._skip()
            self._take(":")
            place = join_key(path, key)
            value = self._value(depth + 1, place)
            if key in entries:
                first = entries[key].line
                self._problems.add(place, f"duplicate key; the first is on line {first}", line)
            else:
                entries[key] = Entry(key, line, value)
            if self._closes("}"):
                return tuple(entries.values())

    def _array(self, depth: int, path: str) -> tuple[Node, ...]:
        items: list[Node] = []
        self._at += 1
        self._skip()
        if self._peek() == "]":
            self._at += 1
            return ()
        while True:
            items.append(self._value(depth + 1, f"{path}[{len(items)}]"))
            if self._closes("]"):
                return tuple(items)

    def _take(self, character: str) -> None:
        if self._peek() != character:
            raise self._error(f"expected {character!r}")
        self._at += 1
        self._skip()

    def _closes(self, bracket: str) -> bool:
        """Step over a comma (False) or the closing bracket (True)."""
        self._skip()
        if self._peek() == bracket:
            self._at += 1
            return True
        self._take(",")
        return False
