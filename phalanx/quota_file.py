"""The file that says what single namespaces may have, where that is not what the flags say for all.

    {"namespaces": {"vision": {"jobs": 50, "running_jobs": 4, "slots": 32, "bytes": "2TiB"},
                    "scratch": {"jobs": 5, "bytes": "10GiB"}}}

What a namespace's entry does not name, and what no entry is there for, is as the flags of control
and storage say; 0 stands for no limit. The file is read again whenever it has changed; while it
cannot be used, what was read last counts.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phalanx.config import read_bytes
from phalanx.errors import FailedPrecondition, InvalidArgument, PhalanxError, Violation
from phalanx.ids import check_namespace
from phalanx.keys.files import Watched
from phalanx.quotas import Limits, Namespaces

_NAMES = frozenset(field.name for field in dataclasses.fields(Limits))


class QuotaFile:
    """The file as it is now; without a path there are no exceptions from the flags."""

    def __init__(self, path: Path | None) -> None:
        self._watched = None if path is None else Watched([path], lambda found: parse(found[0]))

    def read(self) -> tuple[int, Namespaces]:
        """Return the number of the present version and what it says.

        Raises FailedPrecondition where it could never be read.
        """
        return (0, {}) if self._watched is None else self._watched.read()


def violations_of(path: Path | None) -> Sequence[Violation]:
    """Return what is wrong with the setting that names the file."""
    try:
        QuotaFile(path).read()
    except FailedPrecondition as error:
        return [Violation("quotas", error.message)]
    return []


def parse(content: bytes) -> Namespaces:
    """Return what a file says. Raises FailedPrecondition (BAD_QUOTA_FILE)."""
    try:
        document = json.loads(content)
        listed = document["namespaces"]
        if set(document) != {"namespaces"} or not isinstance(listed, dict):
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise _broken('it must be JSON of the form {"namespaces": {"NAME": {…}}}') from None
    found = {}
    for namespace, limits in listed.items():
        try:
            found[check_namespace(namespace)] = _limits(limits)
        except PhalanxError as error:
            raise _broken(f"namespaces.{namespace[:80]}: {error.message}") from None
    return found


def _limits(fields: Any) -> Limits:
    if not isinstance(fields, dict):
        raise InvalidArgument("must be an object with limits")
    unknown = fields.keys() - _NAMES
    if unknown:
        known = ", ".join(sorted(_NAMES))
        raise InvalidArgument(f"{min(unknown)[:40]!r} is no limit; there are {known}")
    return Limits(**{name: _number(name, value) for name, value in fields.items()})


def _number(name: str, value: Any) -> int:
    if name.endswith("bytes") and isinstance(value, str):
        try:
            value = read_bytes(value)
        except ValueError as error:
            raise InvalidArgument(f"{name} {error}") from None
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InvalidArgument(f"{name} must be a whole number, 0 or more")
    return value


def _broken(what: str) -> FailedPrecondition:
    return FailedPrecondition(f"the file of quotas cannot be used: {what}", reason="BAD_QUOTA_FILE")
