"""Files that are replaced while a process runs: certificates, keys, tokens."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from phalanx.errors import FailedPrecondition, PhalanxError
from phalanx.telemetry.logs import get_logger

_READS_MAX = 5

ValueT = TypeVar("ValueT")
_Stamp = tuple[tuple[int, int, int], ...]

_log = get_logger(__name__)


class Watched(Generic[ValueT]):
    """What `parse` makes of the contents of some files, as they are now.

    Whoever asks looks whether a file is another one: that is one `stat` each. While they cannot be
    read, or not as a whole, what was read last goes on to count. Threads may share it.
    """

    def __init__(self, paths: Sequence[Path], parse: Callable[[Sequence[bytes]], ValueT]) -> None:
        self._paths = tuple(paths)
        self._parse = parse
        self._lock = threading.Lock()
        self._stamp: _Stamp | None = None
        self._refused: _Stamp | None = None
        self._version = 0
        self._value: ValueT | None = None
        self._complained = ""

    def read(self) -> tuple[int, ValueT]:
        """Return the number of the present version and the value.

        Raises FailedPrecondition where there is no value yet and none can be read.
        """
        with self._lock:
            try:
                stamp = _stamp(self._paths)
                if self._value is None or stamp not in (self._stamp, self._refused):
                    self._read(stamp)
                    self._complained = ""
            except (OSError, PhalanxError) as error:
                if self._value is None:
                    raise _unreadable(error) from error
                if self._complained != (why := _why(error)):
                    self._complained = why
                    _log.warning("key_files_not_taken", reason=why)
            assert self._value is not None
            return self._version, self._value

    def _read(self, stamp: _Stamp) -> None:
        for _ in range(_READS_MAX):
            contents = [path.read_bytes() for path in self._paths]
            try:
                value = self._parse(contents)
            except PhalanxError:
                if stamp == (now := _stamp(self._paths)):
                    # Looked at again once they are others; until then it is no news.
                    self._refused = stamp
                    raise
            else:
                if stamp == (now := _stamp(self._paths)):
                    self._stamp, self._value = stamp, value
                    self._version += 1
                    return
            stamp = now
        raise FailedPrecondition("they change all the time", reason="KEYS_UNUSABLE")


def check_pair(certificate: Path, key: Path) -> None:
    """Raise FailedPrecondition unless a key is that of a certificate."""
    import ssl

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except OSError as error:
        raise FailedPrecondition(
            f"{certificate} and {key} are no certificate and its key: {_why(error)}",
            reason="KEYS_UNUSABLE",
        ) from error


def check_trusted(ca: Path) -> None:
    """Raise FailedPrecondition unless a file holds certificates to trust."""
    import ssl

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(ca)
    except OSError as error:
        raise FailedPrecondition(
            f"{ca} holds no certificates in PEM: {_why(error)}", reason="KEYS_UNUSABLE"
        ) from error


def _stamp(paths: Sequence[Path]) -> _Stamp:
    stats = [os.stat(path) for path in paths]
    return tuple((each.st_mtime_ns, each.st_ino, each.st_size) for each in stats)


def _unreadable(error: Exception) -> FailedPrecondition:
    if isinstance(error, FailedPrecondition):
        return error
    return FailedPrecondition(f"keys cannot be read: {_why(error)}", reason="KEYS_UNUSABLE")


def _why(error: Exception) -> str:
    """What is wrong, without anything that stood in a file."""
    if reason := getattr(error, "reason", "") if error.__class__.__name__ == "SSLError" else "":
        return str(reason)
    if isinstance(error, OSError):
        return f"{error.filename or 'a file'}: {error.strerror}"
    return str(error)
