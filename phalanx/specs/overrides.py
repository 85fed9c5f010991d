"""`--set path=value`: settings that win over a job file, applied to its tree before it is read."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from phalanx.specs.tree import NO_LINE, Entry, Node, Problems
from phalanx.specs.yaml_text import parse_yaml

_PATH = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*")


def apply_overrides(root: Node, settings: Iterable[str], problems: Problems) -> Node:
    """Return the tree with each `path=value` put in; mappings on the way are made as needed.

    A path may not go through a list. Wrong settings are noted in `problems`.
    """
    for setting in settings:
        path, equals, text = setting.partition("=")
        path = path.strip()
        if not equals or not _PATH.fullmatch(path):
            problems.add("", f"--set {setting}: write path=value, as train.batch_size=1024", None)
            continue
        value = _parse_value(setting, text, problems)
        if value is not None:
            root = _put(root, path.split("."), value, f"--set {setting}", problems)
    return root


def _parse_value(setting: str, text: str, problems: Problems) -> Node | None:
    inner = Problems("--set")
    node = parse_yaml(text, inner) if text.strip() else Node(NO_LINE, "scalar", "")
    for each in inner.violations:
        problems.add(each.field, f"--set {setting}: {each.message}", None)
    return None if node is None else _without_lines(node)


def _without_lines(node: Node) -> Node:
    """Return a value that stands nowhere in the file."""
    return replace(
        node,
        line=NO_LINE,
        entries=tuple(
            Entry(each.key, NO_LINE, _without_lines(each.value)) for each in node.entries
        ),
        items=tuple(map(_without_lines, node.items)),
    )


def _put(node: Node, names: list[str], value: Node, setting: str, problems: Problems) -> Node:
    if not names:
        return value
    empty = node.kind == "scalar" and node.scalar is None
    if node.kind != "mapping" and not empty:
        problems.add("", f"{setting}: {names[0]} cannot be set inside {node.describe()}", None)
        return node
    entries = list(node.entries)
    for index, entry in enumerate(entries):
        if _same(entry.key, names[0]):
            put = _put(entry.value, names[1:], value, setting, problems)
            entries[index] = Entry(entry.key, entry.line if names[1:] else NO_LINE, put)
            break
    else:
        put = _put(Node(NO_LINE, "mapping"), names[1:], value, setting, problems)
        entries.append(Entry(names[0], NO_LINE, put))
    return Node(node.line, "mapping", entries=tuple(entries))


def _same(one: str, other: str) -> bool:
    """Whether two keys spell the same field (snake_case or camelCase)."""
    return one == other or one.replace("_", "").lower() == other.replace("_", "").lower()
