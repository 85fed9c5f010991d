"""Writing results: tables for people, JSON for programs."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from google.protobuf.message import Message

from phalanx.sdk.wire_json import message_to_json

if TYPE_CHECKING:
    from rich.console import Console

    from phalanx.v1.job_spec_pb2 import JobSpec

# Text that YAML reads as text without quotes, and lines that it keeps as they are.
_PLAIN = re.compile(r"(?!(?i:true|false|null)$)[A-Za-z][\w.@/-]*|[0-9.]+s", re.ASCII)
_BLOCK = re.compile(r"(?! )[\t -~\n]+[!-~]\n")


def print_json(value: object) -> None:
    """Write one JSON object on one line."""
    shown = message_to_json(value) if isinstance(value, Message) else value
    print(json.dumps(shown, ensure_ascii=False), flush=True)


def deleted_text(name: str) -> str:
    """Say what is gone: one version, or all that a name had."""
    return f"deleted {name}" if "@" in name else f"deleted {name}, all versions"


def print_json_list(
    name: str, messages: Iterable[Message | dict[str, object]], incomplete: str = ""
) -> None:
    """Write a whole list as the one object of the contract; where it may not be whole, say why."""
    items = [message_to_json(item) if isinstance(item, Message) else item for item in messages]
    shown: dict[str, object] = {name: items, "next_page_token": ""}
    if incomplete:
        shown["incomplete"] = incomplete
    print_json(shown)


def say(text: str) -> None:
    """Write a remark for people: to standard error, so that results can be piped."""
    print(text, file=sys.stderr, flush=True)


def console(*, stderr: bool = False) -> Console:
    """Return a console; without a terminal it is as wide as the longest line needs."""
    from rich.console import Console

    found = Console(stderr=stderr, highlight=False, emoji=False, markup=False)
    if not found.is_terminal and "COLUMNS" not in found._environ:  # noqa: SLF001
        found = Console(
            stderr=stderr, highlight=False, emoji=False, markup=False, width=200, soft_wrap=True
        )
    return found


def print_table(headings: Sequence[str], rows: Iterable[Sequence[object]], empty: str) -> None:
    """Write a plain table; numbers are aligned right. ``empty`` is said when there are no rows."""
    shown = [[_cell(value) for value in row] for row in rows]
    if not shown:
        say(empty)
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for index, heading in enumerate(headings):
        numeric = all(_is_number(row[index]) for row in shown)
        # The first column names the thing; it is never cut.
        table.add_column(
            heading,
            justify="right" if numeric else "left",
            no_wrap=index == 0 or numeric,
            overflow="fold",
        )
    for row in shown:
        table.add_row(*row)
    console().print(table)


def print_fields(fields: Iterable[tuple[str, object]]) -> None:
    """Write name and value pairs, one per line, aligned; empty values are left out."""
    pairs = [(name, _cell(value)) for name, value in fields if value not in ("", None)]
    width = max((len(name) for name, _ in pairs), default=0)
    for name, value in pairs:
        print(f"{name:<{width}}  {value}")


def print_spec(spec: JobSpec, *, indent: int = 0) -> None:
    """Write a job's spec as the YAML of a job file."""
    from phalanx.specs import to_json

    _print_tree(to_json(spec), indent)


def _print_tree(tree: Mapping[str, Any], indent: int) -> None:
    margin = " " * indent
    for key, item in tree.items():
        name = margin + _scalar_text(key)
        if isinstance(item, dict) and item:
            print(f"{name}:")
            _print_tree(item, indent + 2)
        elif isinstance(item, str) and _BLOCK.fullmatch(item):
            print(f"{name}: |")
            for line in item.splitlines():
                print(f"{margin}  {line}" if line else "")
        else:
            print(f"{name}: {_scalar_text(item)}")


def _scalar_text(item: object) -> str:
    if isinstance(item, str) and _PLAIN.fullmatch(item):
        return item
    return json.dumps(item, ensure_ascii=False)


def bytes_text(size_bytes: int) -> str:
    """Return ``4.2 MiB``."""
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def time_text(time: datetime) -> str:
    """Return a date and time in the zone of this machine."""
    return f"{time:%Y-%m-%d %H:%M:%S}"


def metric_text(value: float) -> str:
    """Return a number that is easy to compare: five significant digits."""
    return f"{value:.5g}"


def _cell(value: object) -> str:
    if isinstance(value, datetime):
        return time_text(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return metric_text(value)
    return str(value)


def _is_number(text: str) -> bool:
    return bool(text) and text.replace(",", "").replace(".", "").replace("-", "").isdigit()
