"""What names may look like.

A key is the only thing of a request that ever becomes part of a file name or of a statement's
arguments. The leading class of the pattern is what refuses ``..``, absolute paths and hidden files;
the patterns are ASCII only, so that no two spellings of one name exist.
"""

import re

from phalanx.errors import InvalidArgument, Violation

_PART = r"[a-z0-9][a-z0-9._-]{0,127}"
_KEY = re.compile(_PART, re.ASCII)
_STREAM = re.compile(rf"{_PART}(?:/{_PART}){{0,2}}", re.ASCII)
_FILE_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
_FILE_PATH = re.compile(rf"{_FILE_PART}(?:/{_FILE_PART}){{0,7}}", re.ASCII)
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)
_WORD = re.compile(r"[!-~]{1,256}", re.ASCII)

KEY_RULE = (
    "lower-case letters, digits, '.', '_' and '-', at most 128, the first one a letter or a digit"
)


def check_key(value: str, field: str) -> str:
    """Return ``value`` if it is a key; raise InvalidArgument naming ``field`` if not."""
    return _check(_KEY, value, field, KEY_RULE)


def check_stream(value: str, field: str) -> str:
    """Return ``value`` if it is 1 to 3 keys with '/' between; raise InvalidArgument if not."""
    return _check(_STREAM, value, field, f"one to three parts with '/' between, each: {KEY_RULE}")


def check_digest(value: str, field: str) -> str:
    """Return ``value`` if it is a lower-case hexadecimal SHA-256; raise InvalidArgument if not."""
    return _check(_DIGEST, value, field, "a SHA-256 in 64 lower-case hexadecimal digits")


def is_digest(value: str) -> bool:
    """Say whether ``value`` is a lower-case hexadecimal SHA-256."""
    return _DIGEST.fullmatch(value) is not None


def check_file_path(value: str, field: str) -> str:
    """Return ``value`` if it is a safe relative path on any disk; raise InvalidArgument if not."""
    rule = "a relative path of at most 8 parts of letters, digits, '.', '_' and '-'"
    return _check(_FILE_PATH, value, field, rule)


def check_word(value: str, field: str) -> str:
    """Return ``value`` if it can be a holder or a request id; raise InvalidArgument if not."""
    return _check(_WORD, value, field, "1 to 256 printable ASCII characters without spaces")


def invalid(field: str, message: str) -> InvalidArgument:
    """Return the error for one wrong field of a request."""
    return InvalidArgument(f"{field}: {message}", violations=(Violation(field, message),))


def _check(pattern: re.Pattern[str], value: str, field: str, rule: str) -> str:
    if pattern.fullmatch(value) is None:
        shown = value if len(value) <= 160 else value[:157] + "..."
        raise invalid(field, f"{shown!r} is not allowed; write {rule}")
    return value
