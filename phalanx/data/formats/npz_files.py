"""NPZ files, read member by member in pieces, so that neither compression nor size needs memory.

Objects (pickles) are refused.
"""

import contextlib
import functools
import math
import tokenize
import zipfile
import zlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from phalanx.data.formats.arrays import (
    PairInFile,
    array_where,
    batch_rows,
    check_numeric,
    check_rows,
    flat_width,
    target_values,
)
from phalanx.data.options import IngestOptions
from phalanx.data.preprocess import NumericValues
from phalanx.data.sources import ArrayBatch, Opened
from phalanx.data.wording import option
from phalanx.errors import InvalidArgument, NotFound

_FEATURE_KEYS = ("X", "x", "features", "data", "X_train", "x_train")
_TARGET_KEYS = ("y", "Y", "target", "targets", "label", "labels", "y_train", "Y_train")
_TEST_KEYS = {"X_train": ("X_test", "y_test"), "x_train": ("x_test", "y_test")}


@dataclass(frozen=True)
class _Member:
    """An array of the file: its key and header."""

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran_order: bool


class NpzArrays(PairInFile):
    """One pair of arrays of an NPZ file."""

    def __init__(self, path: Path, features_key: str, target_key: str) -> None:
        members = _members(path)
        super().__init__(path, features_key, target_key)
        self._features = _member(members, features_key, path)
        self._targets = _member(members, target_key, path)
        self._width = flat_width(self._features.shape, path.name, f"{features_key!r}")
        check_numeric(self._features.dtype, path.name)
        targets = self._targets.shape[0] if self._targets.shape else 0
        check_rows(self._features.shape[0], targets, path.name)
        self._describe(self._width, self._features.dtype, self._targets.dtype)

    def batches(self) -> Iterator[ArrayBatch]:
        """All rows in order."""
        step = batch_rows(self._width, self._features.dtype.itemsize)
        # The pieces hold the archive's file open, whatever becomes of this generator.
        with (
            _reading(self._path) as archive,
            contextlib.closing(_pieces(archive, self._features, step)) as features,
            contextlib.closing(_pieces(archive, self._targets, step)) as targets,
        ):
            for number, (rows, labels) in enumerate(zip(features, targets, strict=True)):
                yield ArrayBatch(
                    features=rows.reshape(len(rows), self._width),
                    targets=target_values(labels, self._path.name),
                    where=functools.partial(array_where, self._path.name, number * step),
                )


_DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, EOFError),
    *(NotImplementedError, RuntimeError),  # a later version of ZIP; a password
)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (*_DAMAGE, OSError) as error:
        raise InvalidArgument(f"{path.name} is damaged: {error}") from error


def open_npz(path: Path, options: IngestOptions) -> Opened:
    """The arrays that the options or habit name; ``x_test``, ``y_test`` become the test split."""
    members = _members(path)
    features_key = options.features_key or _usual(members, _FEATURE_KEYS, "features", path)
    target_key = options.target_key or _usual(members, _TARGET_KEYS, "target", path)
    test = None
    if features_key in _TEST_KEYS and set(_TEST_KEYS[features_key]) <= set(members):
        test = NpzArrays(path, *_TEST_KEYS[features_key])
    return Opened(NpzArrays(path, features_key, target_key), test)


def npz_features(path: Path, features_key: str | None = None) -> Iterator[ArrayBatch]:
    """The features alone, with zeros for targets: the usual array, or the only one."""
    members = _members(path)
    if features_key is None:
        found = list(members) if len(members) == 1 else _known(members, _FEATURE_KEYS)
        if not found:
            raise InvalidArgument(
                f"{path.name} has the arrays {', '.join(members)}; rows to predict are its only "
                f"one, or called one of {', '.join(_FEATURE_KEYS)}"
            )
        features_key = found[0]
    member = _member(members, features_key, path)
    width = flat_width(member.shape, path.name, f"{features_key!r}")
    check_numeric(member.dtype, path.name)
    step = batch_rows(width, member.dtype.itemsize)
    with _reading(path) as archive:
        for number, piece in enumerate(_pieces(archive, member, step)):
            yield ArrayBatch(
                features=piece.reshape(len(piece), width),
                targets=NumericValues(np.zeros(len(piece))),
                where=functools.partial(array_where, path.name, number * step),
            )


def _usual(members: dict[str, _Member], candidates: tuple[str, ...], what: str, path: Path) -> str:
    found = _known(members, candidates)
    if not found:
        raise InvalidArgument(
            f"{path.name} has the arrays {', '.join(members)}; say which one "
            f"holds the {what} with {option(f'{what}_key')}"
        )
    return found[0]


def _known(members: dict[str, _Member], candidates: tuple[str, ...]) -> list[str]:
    return [key for key in candidates if key in members]


def _member(members: dict[str, _Member], key: str, path: Path) -> _Member:
    if key not in members:
        raise InvalidArgument(f"{path.name} has no array {key!r}; it has {', '.join(members)}")
    member = members[key]
    if member.dtype.hasobject:
        raise InvalidArgument(
            f"{path.name}: {key!r} holds Python objects (a pickle), which are never loaded; "
            "save it as numbers or as fixed-width text"
        )
    return member


def _members(path: Path) -> dict[str, _Member]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {
                name.removesuffix(".npy"): _header(archive, name)
                for name in archive.namelist()
                if name.endswith(".npy")
            }
    except FileNotFoundError as error:
        raise NotFound(f"there is no file {path}") from error
    except (*_DAMAGE, ValueError, OSError) as error:
        raise InvalidArgument(f"{path.name} is not an NPZ file: {error}") from error
    if not members:
        raise InvalidArgument(f"{path.name} is not an NPZ file: it is an archive without arrays")
    return members


def _header(archive: zipfile.ZipFile, name: str) -> _Member:
    with archive.open(name) as file:
        shape, fortran_order, dtype = _read_header(file)
    return _Member(name.removesuffix(".npy"), shape, dtype, fortran_order)


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    try:
        return _parsed_header(file)
    except (SyntaxError, tokenize.TokenError) as error:
        # NumPy reads a header that is no Python literal once more, as one of Python 2.
        raise ValueError(f"the header of an array is no literal: {error}") from error


def _parsed_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


def _pieces(
    archive: zipfile.ZipFile, member: _Member, step: int
) -> Generator[NDArray[Any], None, None]:
    """Rows of an array, ``step`` at a time."""
    rows = member.shape[0]
    row_shape = member.shape[1:]
    with archive.open(f"{member.key}.npy") as file:
        _read_header(file)
        if member.fortran_order and row_shape:
            # Its rows are scattered over the whole file; there is no way around reading all of it.
            # Not a byte more than it says: the archive may unfold into anything.
            whole_bytes = member.dtype.itemsize * math.prod(member.shape)
            data = file.read(whole_bytes + 1)
            if len(data) != whole_bytes:
                raise EOFError(f"{member.key} does not have the bytes of its shape")
            whole = np.frombuffer(data, member.dtype).reshape(member.shape, order="F")
            for first in range(0, rows, step):
                yield whole[first : first + step]
            return
        row_bytes = member.dtype.itemsize * math.prod(row_shape)
        for first in range(0, rows, step):
            count = min(step, rows - first)
            data = file.read(count * row_bytes)
            if len(data) != count * row_bytes:
                raise EOFError(f"{member.key} ends early")
            yield np.frombuffer(data, member.dtype).reshape((count, *row_shape))
