"""Tokens of people: the file that a server reads, and how new ones are made.

The file holds the SHA-256 of each token, never a token. They are random and long, so nothing slower
than SHA-256 is needed to keep them from being guessed.

    {"tokens": [{"name": "ann", "role": "submitter", "sha256": "…", "namespaces": ["vision"],
                 "permissions": ["code"], "expires": "2027-01-31T00:00:00Z"}]}

`namespaces` is `["*"]` for all of them; without `expires` a token lasts until it is taken out.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from phalanx.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PhalanxError,
    Unauthenticated,
)
from phalanx.files import replace_content
from phalanx.ids import check_name, check_namespace
from phalanx.keys.caller import PERMISSIONS, Caller, Role
from phalanx.keys.files import Watched

PREFIX = "phx_"
"""Of every token, so that scanners for secrets know one when they see it."""
EVERYWHERE = "*"
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_FIELDS = frozenset({"name", "role", "sha256", "namespaces", "permissions", "expires"})
_MODE = 0o600


@dataclass(frozen=True)
class TokenEntry:
    """One token as the file has it; `expires_s` is Unix time, None: never."""

    name: str
    role: Role
    sha256: str
    namespaces: tuple[str, ...]
    permissions: tuple[str, ...] = ()
    expires_s: float | None = None

    def caller(self) -> Caller:
        """Return whose token it is."""
        everywhere = EVERYWHERE in self.namespaces
        return Caller(
            self.name,
            role=self.role,
            namespaces=None if everywhere else frozenset(self.namespaces),
            permissions=frozenset(self.permissions),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the entry as it stands in the file."""
        entry: dict[str, Any] = {
            "name": self.name,
            "role": self.role.name.lower(),
            "sha256": self.sha256,
            "namespaces": list(self.namespaces),
            "permissions": list(self.permissions),
        }
        if self.expires_s is not None:
            entry["expires"] = _time_text(self.expires_s)
        return entry


class TokenFile:
    """The tokens that a server takes. The file is read again whenever it has changed."""

    def __init__(self, path: Path, now_s: Callable[[], float] = time.time) -> None:
        self._now_s = now_s
        self._watched = Watched([path], lambda contents: _by_hash(parse(contents[0])))

    def check(self) -> None:
        """Raise FailedPrecondition where the file cannot be used."""
        self._watched.read()

    def caller(self, token: str) -> Caller:
        """Return whose token this is. Raises Unauthenticated, without a word of the token."""
        _, entries = self._watched.read()
        entry = entries.get(hash_of(token))
        if entry is None:
            raise Unauthenticated(
                "this token is not known here; ask an administrator for a new one",
                reason="UNKNOWN_TOKEN",
            )
        if entry.expires_s is not None and self._now_s() >= entry.expires_s:
            raise Unauthenticated(
                f"the token of {entry.name} expired at {_time_text(entry.expires_s)}; ask an "
                "administrator for a new one",
                reason="TOKEN_EXPIRED",
            )
        return entry.caller()


def hash_of(token: str) -> str:
    """Return what the file has of a token."""
    return hashlib.sha256(token.encode()).hexdigest()


def create(
    path: Path,
    name: str,
    role: Role,
    *,
    namespaces: Sequence[str] = (EVERYWHERE,),
    permissions: Sequence[str] = (),
    expires_s: float | None = None,
) -> str:
    """Add a token to the file, which is made if need be; return the token: nothing else has it.

    Raises InvalidArgument, AlreadyExists and FailedPrecondition.
    """
    token = PREFIX + secrets.token_urlsafe(32)
    entry = TokenEntry(
        check_name(name, "the name"),
        role,
        hash_of(token),
        tuple(namespaces),
        tuple(permissions),
        expires_s,
    )
    # As the file would be read.
    _entry(entry.to_json())
    with _alone(path):
        entries = _read(path) if path.exists() else []
        if any(each.name == name for each in entries):
            raise AlreadyExists(
                f"{path} has a token of {name!r} already; revoke it first, or take another name"
            )
        _write(path, [*entries, entry])
    return token


def revoke(path: Path, name: str) -> None:
    """Take a token out of the file. Raises NotFound."""
    with _alone(path):
        entries = _read(path)
        left = [entry for entry in entries if entry.name != name]
        if len(left) == len(entries):
            raise NotFound(f"{path} has no token of {name!r}")
        _write(path, left)


def entries_of(path: Path) -> list[TokenEntry]:
    """Return what the file holds."""
    return _read(path)


def parse(content: bytes) -> list[TokenEntry]:
    """Return the entries of a file. Raises FailedPrecondition, which never quotes the file."""
    try:
        document = json.loads(content)
        listed = document["tokens"]
        if set(document) != {"tokens"} or not isinstance(listed, list):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise _broken('it must be JSON of the form {"tokens": [...]}') from None
    entries = []
    for index, fields in enumerate(listed):
        try:
            entries.append(_entry(fields))
        except (PhalanxError, ValueError, TypeError, KeyError, AttributeError) as error:
            what = error.message if isinstance(error, PhalanxError) else "a field is wrong"
            raise _broken(f"tokens[{index}]: {what}") from None
    return entries


def read_token(path: Path) -> str:
    """Return the token in a file of its owner. Raises InvalidArgument, which does not quote it."""
    try:
        token = path.read_text(encoding="ascii").strip()
    except OSError as error:
        raise InvalidArgument(f"cannot read the token in {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        token = ""
    return check_token(token, str(path))


def check_token(token: str, what: str = "the token") -> str:
    """Return a token that can be sent. Raises InvalidArgument, which does not quote it."""
    if not token or not all(33 <= ord(each) <= 126 for each in token):
        raise InvalidArgument(f"{what} is no token: it is one line of printable ASCII characters")
    return token


def _entry(fields: Mapping[str, Any]) -> TokenEntry:
    unknown = set(fields) - _FIELDS
    if unknown:
        raise InvalidArgument(f"unknown field {min(unknown)[:40]!r}")
    role = str(fields["role"]).upper()
    if role not in Role.__members__:
        choices = ", ".join(each.name.lower() for each in Role)
        raise InvalidArgument(f"role must be one of {choices}; nodes prove theirs by certificate")
    if not _SHA256.fullmatch(fields["sha256"]):
        raise InvalidArgument("sha256 must be 64 hexadecimal digits")
    namespaces = _words(fields.get("namespaces", []), "namespaces")
    for namespace in namespaces:
        if namespace != EVERYWHERE:
            check_namespace(namespace)
    permissions = _words(fields.get("permissions", []), "permissions")
    for permission in permissions:
        if permission not in PERMISSIONS:
            raise InvalidArgument(f"permissions may be {', '.join(PERMISSIONS)}")
    return TokenEntry(
        check_name(str(fields["name"]), "the name"),
        Role[role],
        fields["sha256"],
        namespaces,
        permissions,
        _time_of(fields["expires"]) if "expires" in fields else None,
    )


def _words(value: Any, what: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise InvalidArgument(f"{what} must be a list of texts")
    return tuple(value)


def _time_of(text: str) -> float:
    when = datetime.fromisoformat(text)
    if when.tzinfo is None:
        raise InvalidArgument("expires needs a time zone, as 2027-01-31T00:00:00Z")
    return when.timestamp()


def _time_text(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _by_hash(entries: Sequence[TokenEntry]) -> dict[str, TokenEntry]:
    return {entry.sha256: entry for entry in entries}


def _broken(what: str) -> FailedPrecondition:
    return FailedPrecondition(f"the file of tokens cannot be used: {what}", reason="BAD_TOKEN_FILE")


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Let nobody else change the file meanwhile: a token that is being revoked must not come back
    with one that is being made. The folder is locked, as the file itself is replaced."""
    try:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise FailedPrecondition(f"cannot read {path.parent}: {error.strerror}") from None
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
        except OSError as error:
            what = f"cannot lock {path.parent}: {error.strerror}"
            raise FailedPrecondition(what) from None
        yield
    finally:
        os.close(folder)


def _read(path: Path) -> list[TokenEntry]:
    try:
        return parse(path.read_bytes())
    except OSError as error:
        raise FailedPrecondition(f"cannot read {path}: {error.strerror}") from None


def _write(path: Path, entries: Sequence[TokenEntry]) -> None:
    text = json.dumps({"tokens": [entry.to_json() for entry in entries]}, indent=2)
    replace_content(path, f"{text}\n".encode(), mode=_MODE)
