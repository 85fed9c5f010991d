"""Wheels that bring a job's code: what may be one, and unpacking them.

Only wheels in pure Python travel with a job. Compiled code is made for one kind of machine, and its
bits may differ from the next; it belongs into the workers' image.
"""

from __future__ import annotations

import sys
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from email.parser import HeaderParser
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from phalanx.errors import InvalidArgument
from phalanx.files import LENGTH_RULE, is_too_long, replace_content
from phalanx.texts import number_of

STREAM = "code"
"""The journal that lists the wheels that were added: JSON with file_name, sha256, size_bytes."""

WHEEL_LIMIT_BYTES = 64 * 1024 * 1024
UNPACKED_LIMIT_BYTES = 256 * 1024 * 1024
FILES_LIMIT = 10_000

_SYMLINK = 0o120000
_KIND_OF_FILE = 0o170000


def wheel_path(digest: str) -> str:
    """Return how a job's plan calls the wheel with this hash among the files of its code."""
    return f"wheels/{digest}.whl"


def check_wheel(source: Path | BinaryIO, name: str) -> None:
    """Raise InvalidArgument unless `source` is a wheel that may travel with a job."""
    with _opened(source, name) as archive:
        _check_tags(_tags(archive, name), name)
        for _ in _members(archive, name):
            pass


def check_python(source: Path, name: str) -> None:
    """Raise InvalidArgument unless the wheel is for the Python that runs this."""
    with _opened(source, name) as archive:
        tags = _tags(archive, name)
    _check_tags(tags, name)
    if not any(_runs_here(python) for tag in tags for python in tag.split("-")[0].split(".")):
        here = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise InvalidArgument(
            f"{name} is for {', '.join(tags)} and this worker has Python {here}; build a wheel for "
            "py3-none-any",
            reason="WHEEL_FOR_ANOTHER_PYTHON",
        )


def write_code(folder: Path, files: Mapping[str, bytes], wheels: Mapping[str, Path]) -> None:
    """Make `folder` hold the source files of a job and what its wheels hold, importable as one.

    Files that are right already stay as they are, and several threads and processes may do this
    at once.

    Args:
        folder: is made if need be.
        files: content by relative path.
        wheels: files by the name that errors call them.

    Raises:
        InvalidArgument: a path leads out of the folder, a wheel is none or is for another Python,
            or two of them bring the same file.
    """
    brought_by: dict[str, str] = {}
    for name, content in sorted(files.items()):
        _claim(brought_by, name, "code.files")
        _write_if_different(folder / _inside(name, "code.files"), content)
    for wheel, path in sorted(wheels.items()):
        check_python(path, wheel)
        with _opened(path, wheel) as archive:
            for name, content in _contents(archive, wheel):
                _claim(brought_by, name, wheel)
                _write_if_different(folder / name, content)


def _claim(brought_by: dict[str, str], name: str, by: str) -> None:
    first = brought_by.setdefault(name, by)
    if first != by:
        raise InvalidArgument(
            f"both {first} and {by} bring a file {name}; a job may have each file once",
            reason="CODE_COLLIDES",
        )


def _opened(source: Path | BinaryIO, name: str) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(source)
    except FileNotFoundError:
        raise
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise _no_wheel(name, str(error)) from error


def _no_wheel(name: str, why: str) -> InvalidArgument:
    return InvalidArgument(
        f"{name} is no wheel ({why}); build one with `pip wheel --no-deps .`", reason="NOT_A_WHEEL"
    )


def _tags(archive: zipfile.ZipFile, name: str) -> list[str]:
    """The tags of a wheel, as py3-none-any."""
    found = [
        member
        for member in archive.namelist()
        if member.endswith(".dist-info/WHEEL") and member.count("/") == 1
    ]
    if len(found) != 1:
        raise _no_wheel(
            name, f"it has {number_of(len(found), 'file')} *.dist-info/WHEEL instead of one"
        )
    if archive.getinfo(found[0]).file_size > 64 * 1024:
        raise _no_wheel(name, f"{found[0]} is too long")
    text = _read(archive, archive.getinfo(found[0]), name).decode("utf-8", "replace")
    tags = [tag.strip() for tag in HeaderParser().parsestr(text).get_all("Tag", [])]
    if not tags or any(tag.count("-") != 2 for tag in tags):
        raise _no_wheel(name, f"{found[0]} has no usable line `Tag:`")
    return tags


def _check_tags(tags: list[str], name: str) -> None:
    if not any(tag.split("-")[1:] == ["none", "any"] for tag in tags):
        raise InvalidArgument(
            f"{name} holds code compiled for {', '.join(tags[:4])}; only wheels in pure Python "
            "(py3-none-any) travel with a job. Install compiled ones on the workers",
            reason="WHEEL_NOT_PURE",
        )


def _runs_here(python: str) -> bool:
    if python in ("py3", f"cp3{sys.version_info.minor}"):
        return True
    minor = python.removeprefix("py3")
    return minor != python and minor.isdigit() and int(minor) <= sys.version_info.minor


def _members(archive: zipfile.ZipFile, name: str) -> Iterator[tuple[str, zipfile.ZipInfo]]:
    """(path below the folder, entry) of all files; what a folder of code has no use for is left."""
    entries = archive.infolist()
    if len(entries) > FILES_LIMIT:
        message = (
            f"{name} has {number_of(len(entries), 'file')}; at most {FILES_LIMIT} travel with a job"
        )
        raise InvalidArgument(message, reason="WHEEL_TOO_LARGE")
    total = sum(entry.file_size for entry in entries)
    if total > UNPACKED_LIMIT_BYTES:
        message = f"{name} unpacks to {total:,} bytes; at most {UNPACKED_LIMIT_BYTES:,} may travel"
        raise InvalidArgument(message, reason="WHEEL_TOO_LARGE")
    for entry in entries:
        if (entry.external_attr >> 16) & _KIND_OF_FILE == _SYMLINK:
            raise _no_wheel(name, f"{entry.filename} is a symbolic link")
        path = _inside(entry.filename, name)
        if entry.is_dir():
            continue
        if path.parts[0].endswith(".data"):
            # What an installer would spread: modules belong beside the others, the rest nowhere.
            if len(path.parts) < 3 or path.parts[1] not in ("purelib", "platlib"):
                continue
            path = PurePosixPath(*path.parts[2:])
        yield str(path), entry


def _contents(archive: zipfile.ZipFile, name: str) -> Iterator[tuple[str, bytes]]:
    for path, entry in _members(archive, name):
        yield path, _read(archive, entry, name)


def _read(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, name: str) -> bytes:
    """The content of an entry, which is as long as the entry says (zipfile reads no further)."""
    # Files lie before the listing. Room is made for as much as is asked for, there or not.
    if entry.compress_size > archive.start_dir:
        raise _no_wheel(name, f"{entry.filename} reaches beyond the end")
    try:
        return archive.read(entry)
    except (
        *(zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError),
        *(ValueError, OSError),  # places in the file that it has not
    ) as error:
        raise _no_wheel(name, f"{entry.filename}: {error}") from error


def _inside(name: str, whose: str) -> PurePosixPath:
    path = PurePosixPath(name)
    odd = "\\" in name or "\0" in name
    if odd or path.is_absolute() or not path.parts or ".." in path.parts:
        raise InvalidArgument(f"{whose}: {name[:80]!r} is no path inside of the job's code")
    if is_too_long(name):
        raise InvalidArgument(f"{whose}: {name[:80]!r}… is too long; {LENGTH_RULE}")
    return path


def _write_if_different(path: Path, content: bytes) -> None:
    try:
        if path.read_bytes() == content:
            return
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (IsADirectoryError, NotADirectoryError) as error:
        raise InvalidArgument(
            f"{path.name} is both a file and a folder of the job's code", reason="CODE_COLLIDES"
        ) from error
    replace_content(path, content)
