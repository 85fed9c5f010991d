"""YAML 1.2 text to a tree with lines.

Only the syntax is left to ruamel.yaml. Scalars are resolved here by the core schema of YAML 1.2:
`1e-3` is a number, `no` and `1_000` are strings.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from phalanx.specs.tree import (
    DEPTH_LIMIT,
    HALF_CHARACTER,
    NODE_LIMIT,
    TEXT_LIMIT_BYTES,
    Entry,
    Node,
    Problems,
    Scalar,
    is_unicode,
    join_key,
)

_INTEGER = re.compile(r"[-+]?[0-9]+")
_OCTAL = re.compile(r"0o[0-7]+")
_HEXADECIMAL = re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITY = re.compile(r"[-+]?\.(inf|Inf|INF)")
_NULL = frozenset(("", "~", "null", "Null", "NULL"))
_TRUE = frozenset(("true", "True", "TRUE"))
_FALSE = frozenset(("false", "False", "FALSE"))
_NAN = frozenset((".nan", ".NaN", ".NAN"))
_TOO_DEEP = f"nested deeper than {DEPTH_LIMIT} levels"
_PLAIN_TAG = "tag:yaml.org,2002:"
_KNOWN_TAGS = frozenset(
    _PLAIN_TAG + name
    for name in ("str", "int", "float", "bool", "null", "map", "seq", "timestamp", "merge", "value")
)


def parse_yaml(text: str, problems: Problems) -> Node | None:
    """Return the tree of one YAML document, None where the text has no tree at all.

    Syntax errors, duplicate keys, tags and texts without end are added to `problems`.
    """
    if len(text.encode("utf-8", "surrogatepass")) > TEXT_LIMIT_BYTES:
        problems.add("", f"the text is longer than {TEXT_LIMIT_BYTES} bytes", None)
        return None
    # Imported here: a control process uses this package and reads no YAML.
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    yaml = YAML(typ="safe", pure=True)
    # Each level makes what is in it slower to read; ruamel.yaml counts the first as one.
    yaml.max_depth = DEPTH_LIMIT + 1
    try:
        root = yaml.compose(text)
    except YAMLError as error:
        problems.add("", *_explain(error))
        return None
    except RecursionError:
        problems.add("", _TOO_DEEP, None)
        return None
    if root is None:
        problems.add("", "the file is empty", None)
        return None
    return _Converter(problems).convert(root, 0)


def resolve_plain(text: str) -> Scalar:
    """Return the value of a plain (unquoted) scalar by the YAML 1.2 core schema."""
    if text in _NULL:
        return None
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    if _INTEGER.fullmatch(text):
        return int(text) if len(text) <= 400 else text
    if _OCTAL.fullmatch(text) or _HEXADECIMAL.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _INFINITY.fullmatch(text):
        return float("-inf" if text.startswith("-") else "inf")
    if text in _NAN:
        return float("nan")
    return text


class _Converter:
    """Turns ruamel's nodes into ours; aliases are followed, so both size and depth are bounded."""

    def __init__(self, problems: Problems) -> None:
        self._problems = problems
        self._seen = 0

    def convert(self, node: Any, depth: int, path: str = "") -> Node | None:
        """Return our node of one of ruamel's, None where it must not be used (noted)."""
        line = node.start_mark.line + 1
        self._seen += 1
        if self._seen > NODE_LIMIT or depth > DEPTH_LIMIT:
            if self._seen != NODE_LIMIT + 2:
                self._problems.add("", "too large or too deep once aliases are followed", line)
            self._seen = NODE_LIMIT + 1
            return None
        if str(node.tag) not in _KNOWN_TAGS:
            self._problems.add(path, f"the tag {node.tag} is not allowed; write plain values", line)
            return None
        if node.id == "mapping":
            return Node(line, "mapping", entries=self._entries(node, depth, path))
        if node.id == "sequence":
            converted = [
                self.convert(item, depth + 1, f"{path}[{index}]")
                for index, item in enumerate(node.value)
            ]
            return Node(line, "sequence", items=tuple(item for item in converted if item))
        if not is_unicode(node.value):
            self._problems.add(path, HALF_CHARACTER, line)
            return None
        if node.style is None:
            scalar = resolve_plain(node.value)
            return Node(line, "scalar", scalar, bare=scalar is None and node.value == "")
        return Node(line, "scalar", str(node.value))

    def _entries(self, node: Any, depth: int, path: str) -> tuple[Entry, ...]:
        entries: dict[str, Entry] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if key_node.id != "scalar":
                self._problems.add(path, "a key must be one word, not a list or mapping", line)
                continue
            key = str(key_node.value)
            if not is_unicode(key):
                self._problems.add(path, f"a key {HALF_CHARACTER}", line)
                continue
            if key in entries:
                first = entries[key].line
                self._problems.add(
                    join_key(path, key), f"duplicate key; the first is on line {first}", line
                )
                continue
            value = self.convert(value_node, depth + 1, join_key(path, key))
            if value is not None and value.bare:
                value = replace(value, line=line)  # ruamel places it where the next token stands
            if value is not None:
                entries[key] = Entry(key, line, value)
        return tuple(entries.values())


def _explain(error: Exception) -> tuple[str, int | None]:
    """(message, line) of a syntax error."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    line = None if mark is None else mark.line + 1
    problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
    if str(problem).startswith("maximum depth"):
        return _TOO_DEEP, line
    hint = "; indent with spaces, not tabs" if "\\t" in str(problem) else ""
    return f"not valid YAML: {problem}{hint}", line
