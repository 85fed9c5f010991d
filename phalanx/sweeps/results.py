"""Results of the tasks of a job that runs within one task, in a file without a name.

A process that is killed takes such a file along, and processes of workers are: for each that is
late or takes too much memory, a folder would be left behind.
"""

from __future__ import annotations

import hashlib
import tempfile
from typing import Self

from phalanx.programs.base import Piece


class Results:
    """Results one after another. Use it as a context manager: at its end they are gone."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed at the end
        self._begins: dict[str, int] = {}
        self._size_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, result: bytes) -> str:
        """Write a result; return the digest that it is read by."""
        digest = hashlib.sha256(result).hexdigest()
        if digest not in self._begins:
            self._file.seek(self._size_bytes)
            self._file.write(result)
            self._begins[digest] = self._size_bytes
            self._size_bytes += len(result)
        return digest

    def read(self, part: Piece) -> bytes:
        """Return a part of a result."""
        self._file.seek(self._begins[part.digest] + part.offset)
        return self._file.read(part.length)
