"""The idx files of MNIST and its kin: images and labels in two files, plain or .gz."""

import functools
import gzip
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from phalanx.data.formats.arrays import (
    array_where,
    batch_rows,
    check_rows,
    flat_width,
    is_whole_bytes,
)
from phalanx.data.formats.paths import check_path
from phalanx.data.manifest import SourceFile
from phalanx.data.preprocess import NumericValues
from phalanx.data.sources import ArrayBatch, ArrayShape, Opened
from phalanx.errors import InvalidArgument

_DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}

_READ_BYTES = 16 << 20


@dataclass(frozen=True)
class _Header:
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


class IdxArrays:
    """Images, or other arrays with rows first, and their labels."""

    def __init__(self, images: Path, labels: Path) -> None:
        self._images, self._labels = images, labels
        self._image_header, self._label_header = _header_of(images), _header_of(labels)
        self._width = flat_width(self._image_header.shape, images.name)
        names = f"{images.name} and {labels.name}"
        check_rows(self._image_header.shape[0], self._label_header.shape[0], names)
        self._shape = ArrayShape(
            features=self._width,
            whole_bytes=is_whole_bytes(self._image_header.dtype),
            labels=True,
        )

    @property
    def shape(self) -> ArrayShape:
        """What the arrays are."""
        return self._shape

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """Names and sizes."""
        return tuple(
            SourceFile(path.name, path.stat().st_size) for path in (self._images, self._labels)
        )

    def batches(self) -> Iterator[ArrayBatch]:
        """All rows in order."""
        step = batch_rows(self._width, self._image_header.dtype.itemsize)
        pieces = zip(
            _pieces(self._images, self._image_header, step),
            _pieces(self._labels, self._label_header, step),
            strict=True,
        )
        for number, (images, labels) in enumerate(pieces):
            yield ArrayBatch(
                features=images.reshape(len(images), self._width),
                targets=NumericValues(labels.astype(np.float64)),
                where=functools.partial(array_where, self._images.name, number * step),
            )


def open_idx(paths: Sequence[Path]) -> Opened:
    """An images file and its labels, in any order; the images alone; a folder with MNIST's names.

    The labels of ``…-images-idx3-ubyte`` are expected in ``…-labels-idx1-ubyte`` beside it. In a
    folder, ``train-…`` is the data and ``t10k-…``, where it exists, the test split.
    """
    if len(paths) == 1 and paths[0].is_dir():
        folder = paths[0]
        train = _named(folder, "train-images-idx")
        if train is None:
            raise InvalidArgument(f"folder {folder} has no file train-images-idx…")
        test = _named(folder, "t10k-images-idx")
        return Opened(_pair([train]), _pair([test]) if test else None)
    return Opened(_pair(paths))


def idx_features(images: Path) -> Iterator[ArrayBatch]:
    """The images alone, with zeros for labels."""
    header = _header_of(images)
    width = flat_width(header.shape, images.name)
    step = batch_rows(width, header.dtype.itemsize)
    for number, piece in enumerate(_pieces(images, header, step)):
        yield ArrayBatch(
            features=piece.reshape(len(piece), width),
            targets=NumericValues(np.zeros(len(piece))),
            where=functools.partial(array_where, images.name, number * step),
        )


def _pair(paths: Sequence[Path]) -> IdxArrays:
    if len(paths) == 1:
        images = paths[0]
        name = images.name.replace("images-idx3", "labels-idx1")
        labels = images.with_name(name)
        if name == images.name or not labels.exists():
            raise InvalidArgument(f"{images.name}: name the file of its labels too")
        return IdxArrays(images, labels)
    if len(paths) != 2:
        raise InvalidArgument(f"idx data is one images file and one labels file, not {len(paths)}")
    by_dimensions = sorted(paths, key=lambda path: len(_header_of(path).shape))
    labels, images = by_dimensions
    if len(_header_of(labels).shape) != 1:
        raise InvalidArgument(f"neither {paths[0].name} nor {paths[1].name} holds labels")
    return IdxArrays(images, labels)


def _named(folder: Path, start: str) -> Path | None:
    found = sorted(path for path in folder.iterdir() if path.name.startswith(start))
    return found[0] if found else None


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return cast("IO[bytes]", gzip.open(path, "rb"))
    return path.open("rb")


def _header_of(path: Path) -> _Header:
    check_path(path)
    try:
        with _open(path) as file:
            return _read_header(file, path)
    except (EOFError, zlib.error, OSError) as error:
        raise InvalidArgument(f"{path.name} is not an idx file: {error}") from error


def _read_header(file: IO[bytes], path: Path) -> _Header:
    magic = file.read(4)
    if len(magic) != 4 or magic[:2] != b"\0\0" or magic[2] not in _DTYPES or magic[3] == 0:
        raise InvalidArgument(f"{path.name} is not an idx file: it starts with {magic.hex(' ')}")
    extents = file.read(4 * magic[3])
    if len(extents) != 4 * magic[3]:
        raise InvalidArgument(f"{path.name} is not an idx file: its header is cut off")
    shape = tuple(np.frombuffer(extents, ">u4").tolist())
    return _Header(np.dtype(_DTYPES[magic[2]]), shape)


def _read(file: IO[bytes], size: int) -> bytes:
    """That many bytes, or fewer at the end; a header that lies costs no memory."""
    parts = []
    while size and (part := file.read(min(size, _READ_BYTES))):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _pieces(path: Path, header: _Header, step: int) -> Iterator[NDArray[Any]]:
    rows, row_shape = header.shape[0], header.shape[1:]
    row_bytes = header.dtype.itemsize * math.prod(row_shape)
    try:
        with _open(path) as file:
            _read_header(file, path)
            for first in range(0, rows, step):
                count = min(step, rows - first)
                data = _read(file, count * row_bytes)
                if len(data) != count * row_bytes:
                    raise InvalidArgument(
                        f"{path.name} ends after row {first + len(data) // row_bytes} of {rows}"
                    )
                piece = np.frombuffer(data, header.dtype).reshape((count, *row_shape))
                yield piece.astype(header.dtype.newbyteorder("="), copy=False)
    except (EOFError, zlib.error, OSError) as error:
        raise InvalidArgument(f"{path.name} is damaged: {error}") from error
