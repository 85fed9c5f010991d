"""What callers of the SDK hand over, checked for its kind.

A wrong one is named, and what is taken instead: protobuf and pathlib would raise a TypeError that
says neither, and None would pass for what is empty.
"""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Real
from operator import index
from os import PathLike
from pathlib import Path
from typing import SupportsIndex

from phalanx.errors import InvalidArgument, Violation

JOB_ID = "the id of a job, as job.id"
WORKER_ID = "the id of a worker, as cluster.workers() lists them"
DATASET_NAME = "the name of a data set: NAME or NAME@VERSION"
MODEL_NAME = "the name of a model: NAME or NAME@VERSION, as job.result.model"


def wrong_kind(field: str, value: object, wanted: str) -> InvalidArgument:
    """Return the error for a value that is not ``wanted``."""
    message = f"is {_kind_of(value)}; give {wanted}"
    return InvalidArgument(f"{field} {message}", violations=[Violation(field, message)])


def text(field: str, value: object, wanted: str) -> str:
    """Return a string as it is. Raises InvalidArgument for anything else."""
    if isinstance(value, str):
        return value
    raise wrong_kind(field, value, wanted)


def texts(field: str, values: object, wanted: str) -> list[str]:
    """Return a sequence of strings; a string is none, although its characters would be."""
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise wrong_kind(field, values, f"a list: {wanted}")
    return [text(field, value, wanted) for value in values]


def whole(field: str, value: object, wanted: str = "a whole number") -> int:
    """Return a whole number, which may be one of NumPy's. Raises InvalidArgument."""
    if isinstance(value, SupportsIndex) and not isinstance(value, bool):
        return index(value)
    raise wrong_kind(field, value, wanted)


def wholes(field: str, values: object, wanted: str) -> list[int]:
    """Return a sequence of whole numbers. Raises InvalidArgument for anything else."""
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise wrong_kind(field, values, f"a list: {wanted}")
    return [whole(field, value, wanted) for value in values]


def path(field: str, value: object, wanted: str) -> Path:
    """Return the path that a string or an ``os.PathLike`` names. Raises InvalidArgument."""
    named = value.__fspath__() if isinstance(value, PathLike) else value
    if isinstance(named, str) and "\0" in named:
        raise InvalidArgument(f"{field} is {named[:60]!r}, which is no path; give {wanted}")
    return Path(text(field, named, wanted))


def seconds(field: str, value: object) -> float:
    """Return a number of seconds. Raises InvalidArgument."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise wrong_kind(field, value, "a number of seconds")
    return float(value)


def _kind_of(value: object) -> str:
    if value is None:
        return "None"
    name = type(value).__name__
    if name == "bytes":
        return name
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
