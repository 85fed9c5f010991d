"""Names and identifiers: their types, how new ones are made and which are allowed."""

import re
import secrets
from typing import NewType

from phalanx.errors import InvalidArgument, Violation

Incarnation = NewType("Incarnation", str)
"""One start of a process; a new one means that everything it held in memory is gone."""
BlobId = NewType("BlobId", str)
"""Lower-case hexadecimal SHA-256 of a blob's bytes."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}", re.ASCII)
_REFERENCE = re.compile(rf"({_NAME.pattern}/)?{_NAME.pattern}(@[1-9][0-9]{{0,17}})?", re.ASCII)
_SHORT_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?", re.ASCII)
_BLOB_ID = re.compile(r"[0-9a-f]{64}", re.ASCII)
# No vowels and no look-alikes: ids are read aloud, and must not spell words.
_ALPHABET = "23456789bcdfghjkmnpqrstvwxz"
_MADE_ID = re.compile(rf"[a-z0-9][-a-z0-9]*-[{_ALPHABET}]{{8}}", re.ASCII)

SHORT_NAME_RULE = "a-z, 0-9 and -, at most 40, first and last a letter or digit"


def new_id(prefix: str, length: int = 8) -> str:
    """Return ``PREFIX-xxxxxxxx`` with random characters that are allowed in names."""
    return f"{prefix}-" + "".join(secrets.choice(_ALPHABET) for _ in range(length))


def is_made_id(text: str) -> bool:
    """Return whether ``text`` looks like what ``new_id`` returns."""
    return _MADE_ID.fullmatch(text) is not None


def new_request_id() -> str:
    """Return an id for one mutating request, to be sent again with its retries."""
    return secrets.token_hex(16)


def new_incarnation() -> Incarnation:
    """Return the id of this start of a process."""
    return Incarnation(secrets.token_hex(8))


def is_name(text: str) -> bool:
    """Return whether ``text`` is a name: a-z, 0-9, ``._-``, not these first; at most 128."""
    return _NAME.fullmatch(text) is not None


def check_name(text: str, what: str) -> str:
    """Return ``text`` if it is a name; else raise InvalidArgument that calls it ``what``."""
    if is_name(text):
        return text
    raise InvalidArgument(
        f"{what} {text[:140]!r} is not a name: use a-z, 0-9 and . _ - (the first a letter or "
        "digit), at most 128 characters",
        reason="BAD_NAME",
    )


def is_short_name(text: str) -> bool:
    """Return whether ``text`` may name a job or a namespace: see ``SHORT_NAME_RULE``."""
    return _SHORT_NAME.fullmatch(text) is not None


def check_namespace(text: str, field: str = "namespace") -> str:
    """Return ``text`` if it may name a namespace; else raise InvalidArgument naming ``field``."""
    if is_short_name(text):
        return text
    message = f"{text[:60]!r} is not allowed; use {SHORT_NAME_RULE}"
    raise InvalidArgument(
        f"{field}: {message}", reason="BAD_NAME", violations=[Violation("namespace", message)]
    )


def is_blob_id(text: str) -> bool:
    """Return whether ``text`` is a lower-case hexadecimal SHA-256."""
    return _BLOB_ID.fullmatch(text) is not None


def check_blob_id(text: str) -> BlobId:
    """Return ``text`` if it is a lower-case hexadecimal SHA-256; else raise InvalidArgument."""
    if not is_blob_id(text):
        raise InvalidArgument(
            f"blob id {text[:80]!r} is not 64 lower-case hexadecimal digits", reason="BAD_BLOB_ID"
        )
    return BlobId(text)


def reference_complaint(text: str, listing: str) -> str:
    """Return what is wrong with the name of a data set or a model in a job; empty: nothing.

    ``listing`` is the command that shows which there are.
    """
    if _REFERENCE.fullmatch(text):
        return ""
    wrong = f"{text[:160]!r} is not allowed" if text else "is missing"
    return f"{wrong}; write NAME, NAME@VERSION or NAMESPACE/NAME@VERSION; see `{listing}`"


def split_version_name(text: str, namespace: str) -> tuple[str, str, str]:
    """Return namespace, name and version, as text, of ``[NAMESPACE/]NAME[@VERSION]``, unchecked.

    A name that says no namespace is in ``namespace``; a version that is not said is empty.
    """
    path, _, version = text.partition("@")
    space, slash, name = path.rpartition("/")
    return (space if slash else namespace), name, version
