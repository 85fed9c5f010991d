"""How bugs are planted into the code that ships, and taken out again; see `mutants`."""

from __future__ import annotations

import importlib
import inspect
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

from tests.simulation.known import KNOWN, Known


@dataclass(frozen=True)
class Change:
    """Replaces text in the source of one function, `module:qualified.name`."""

    where: str
    old: str
    new: str


@dataclass(frozen=True)
class Mutant:
    """One planted bug."""

    name: str
    rule: int
    changes: tuple[Change, ...]
    known: Known | None


def one(name: str, rule: int, where: str, old: str, new: str) -> Mutant:
    """A bug that is one change."""
    return many(name, rule, Change(where, old, new))


def many(name: str, rule: int, *changes: Change) -> Mutant:
    """A bug that is several changes."""
    return Mutant(name, rule, changes, KNOWN.get(name))


def function_at(where: str) -> FunctionType:
    """The function that a change is about."""
    module, _, path = where.partition(":")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = inspect.getattr_static(found, part)
    function = found.fget if isinstance(found, property) else found
    assert isinstance(function, FunctionType), where
    return function


def changed_code(function: FunctionType, changes: tuple[Change, ...]) -> CodeType:
    """The function's code with changes of its text, each of which must fit exactly once."""
    source = textwrap.dedent(inspect.getsource(function))
    for change in changes:
        if source.count(change.old) != 1:
            raise LookupError(
                f"{change.where} holds {source.count(change.old)} times {change.old!r}; adapt the "
                "mutant to the code"
            )
        source = source.replace(change.old, change.new)
    space: dict[str, Any] = dict(function.__globals__)
    # One that calls `super` has its class for a variable of an outer scope.
    source = "def _make(__class__):\n" + textwrap.indent(source, " ")
    source += f"\n return {function.__name__}"
    exec(compile("from __future__ import annotations\n" + source, "<mutant>", "exec"), space)
    made = space["_make"](None)
    return (made.fget if isinstance(made, property) else made).__code__


@contextmanager
def planted(mutant: Mutant) -> Iterator[None]:
    """The bug is there for as long as the block runs."""
    by_function: dict[str, list[Change]] = {}
    for change in mutant.changes:
        by_function.setdefault(change.where, []).append(change)
    before: list[tuple[FunctionType, CodeType]] = []
    try:
        for where, changes in by_function.items():
            function = function_at(where)
            code = changed_code(function, tuple(changes))
            before.append((function, function.__code__))
            function.__code__ = code
        yield
    finally:
        for function, code in before:
            function.__code__ = code
