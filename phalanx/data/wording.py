"""How options are written in messages: in the words of whoever asked for the data to be read.

Messages come from deep inside, where nobody knows the caller. Arguments of Python are the default;
a command line says once how it writes its flags.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

Value = str | Literal[True]
Spelling = Callable[[str, Value], str]
"""From the name of a field of ``IngestOptions``, and a value or "", to what a message says."""

_LISTS = frozenset({"categorical", "columns", "ignore", "numeric"})


def option(name: str, value: Value = "") -> str:
    """``missing='category'`` in Python, ``--missing category`` on a command line."""
    return _spelling.get()(name, value)


@contextmanager
def spelled(spelling: Spelling) -> Iterator[None]:
    """Messages that are made inside write options this way."""
    token = _spelling.set(spelling)
    try:
        yield
    finally:
        _spelling.reset(token)


def _argument(name: str, value: Value) -> str:
    shown = "" if value == "" else repr([value]) if name in _LISTS else repr(value)
    return f"{name}={shown}"


_spelling: ContextVar[Spelling] = ContextVar("spelling", default=_argument)
