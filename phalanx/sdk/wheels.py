"""Wheels with user code, stored as blobs that jobs name by their SHA-256."""

from __future__ import annotations

import json
import operator
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path

from phalanx.errors import InvalidArgument, NotFound
from phalanx.sdk import arguments, methods
from phalanx.sdk.backend import Backend
from phalanx.v1 import storage_service_pb2
from phalanx.wheels import STREAM, WHEEL_LIMIT_BYTES, check_wheel


@dataclass(frozen=True)
class Wheel:
    """One stored wheel."""

    file_name: str
    sha256: str
    size_bytes: int

    def to_json(self) -> dict[str, object]:
        """Return the JSON of ``--json``."""
        return asdict(self)


class Wheels:
    """``cluster.code``: add and list wheels."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def add(self, path: str | PathLike[str]) -> Wheel:
        """Store a wheel; the same file again changes nothing.

        Raises NotFound when there is no such file and InvalidArgument when it is no wheel in pure
        Python.
        """
        file = arguments.path("path", path, "the path of a wheel")
        data = _read_wheel(file)
        wheel = Wheel(file.name, self._backend.put_blob(data), len(data))
        # The pin keeps it from garbage collection until a job needs it.
        pin = storage_service_pb2.Pin(blob=wheel.sha256)
        self._backend.call(
            methods.SET_PINS,
            storage_service_pb2.SetPinsRequest(holder=f"code.{wheel.sha256[:32]}", pins=[pin]),
        )
        if all(known.sha256 != wheel.sha256 for known in self.list()):
            self._backend.call(
                methods.APPEND_JOURNAL,
                storage_service_pb2.AppendJournalRequest(
                    stream=STREAM,
                    expected_sequence=-1,
                    records=[json.dumps(wheel.to_json()).encode()],
                ),
            )
        return wheel

    def list(self) -> list[Wheel]:
        """Return all stored wheels, oldest first."""
        request = storage_service_pb2.ReadJournalRequest(stream=STREAM)
        found = (
            _wheel_in(record.payload)
            for answer in self._backend.stream(methods.READ_JOURNAL, request)
            for record in answer.records
        )
        return [wheel for wheel in found if wheel is not None]


def _wheel_in(record: bytes) -> Wheel | None:
    """Return the wheel in a record; None where somebody left something else for all others."""
    try:
        fields = json.loads(record)
        return Wheel(
            str(fields["file_name"]), str(fields["sha256"]), operator.index(fields["size_bytes"])
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _read_wheel(file: Path) -> bytes:
    if not file.is_file():
        raise NotFound(f"there is no file {file}; give the path of a wheel")
    if file.stat().st_size > WHEEL_LIMIT_BYTES:
        raise InvalidArgument(
            f"{file} has {file.stat().st_size:,} bytes; a wheel may have {WHEEL_LIMIT_BYTES:,}. "
            "Install large dependencies in the workers' image instead"
        )
    if file.suffix != ".whl":
        raise InvalidArgument(f"{file} is no wheel; build one with `pip wheel --no-deps .`")
    check_wheel(file, str(file))
    return file.read_bytes()
