"""Linking: a data set whose rows stay in the user's Parquet files.

Ingestion reads the files as it always does, and so learns the same and cuts the same chunks with
the same digests; only the bytes are not kept. What is kept is where each chunk's rows lie.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow.parquet

from phalanx.data.formats.tables import ParquetTable
from phalanx.data.linked_files import describe_file
from phalanx.data.links import LinkedFile, Links
from phalanx.data.manifest import SPLITS, DatasetManifest
from phalanx.data.options import IngestOptions
from phalanx.data.splits import Splitter, ranges_of
from phalanx.data.wording import option
from phalanx.errors import FailedPrecondition, InvalidArgument, Unimplemented, Violation
from phalanx.texts import number_of

LARGE_GROUP_ROWS = 256 * 1024
"""From so many rows on, it is said that smaller row groups are read faster."""

_S3_URL = re.compile(r"s3a?:/", re.IGNORECASE)


class Digests:
    """A BlobSink that keeps nothing."""

    def put(self, data: bytes) -> str:
        """Return the bytes' lower-case hex SHA-256."""
        return hashlib.sha256(data).hexdigest()


def refuse_urls(paths: Sequence[Path], options: IngestOptions) -> None:
    """Raises Unimplemented for an object of S3, which looks like a path here."""
    given = [*paths, *options.paths("test"), *options.paths("validation")]
    url = next((path for path in given if _S3_URL.match(str(path))), None)
    if url is not None:
        message = (
            "this version reads no objects of S3, to copy or to link them, since its storage does "
            "not reach S3: mount the bucket, or bring the files to a disk"
        )
        shown = str(url).replace(":/", "://", 1)
        field = "link" if options.link else "paths"
        raise Unimplemented(f"{shown}: {message}", violations=(Violation(field, message),))


def refuse_format(format_name: str) -> None:
    """Raises InvalidArgument for anything but Parquet."""
    if format_name == "parquet":
        return
    message = (
        f"only Parquet files can be linked, not {format_name}: rows of other formats cannot be "
        f"found without reading all before them. Leave out {option('link', True)} to have them "
        "copied, or write them to Parquet once"
    )
    raise InvalidArgument(message, violations=(Violation("link", message),))


class Linking:
    """Notes what the files look like before they are read, and makes the links afterwards."""

    def __init__(self, main: ParquetTable, held_out: Mapping[str, ParquetTable]) -> None:
        self._main = main.paths
        self._held_out = {split: table.paths for split, table in held_out.items()}
        self._group_rows = 0
        self._seen = self._look()

    def links(self, manifest: DatasetManifest, options: IngestOptions) -> Links:
        """Where the chunks of the manifest lie; raises FailedPrecondition if a file changed."""
        if self._look() != self._seen:
            raise FailedPrecondition("a file was changed while it was read; add it again")
        files = [self._seen[path] for path in self._main]
        held_out = {
            split: tuple(self._seen[path] for path in paths)
            for split, paths in self._held_out.items()
        }
        dealt = Splitter(options.seed, options.fraction("test"), options.fraction("validation"))
        ranges = {}
        for split, chunks in manifest.splits.items():
            own = held_out.get(split)
            splitter = dealt if own is None else Splitter(0)
            code = SPLITS.index(split) if own is None else 0
            total = sum(file.rows for file in (files if own is None else own))
            ranges[split] = ranges_of(splitter, code, total, [chunk.rows for chunk in chunks])
        return Links(
            files=tuple(files),
            ranges=ranges,
            held_out=held_out,
            test=dealt.test,
            validation=dealt.validation,
            trim_labels=options.trim_labels,
        )

    def notes(self) -> tuple[str, ...]:
        """What may be of use to know."""
        if self._group_rows <= LARGE_GROUP_ROWS:
            return ()
        note = (
            "a chunk is read by decoding the row group that it lies in, and the largest has "
            f"{number_of(self._group_rows, 'row')}: files written with groups of 100,000 are read "
            "faster"
        )
        return (note,)

    def _look(self) -> dict[Path, LinkedFile]:
        paths = [*self._main, *(path for paths in self._held_out.values() for path in paths)]
        return {path: self._described(path) for path in paths}

    def _described(self, path: Path) -> LinkedFile:
        metadata = pyarrow.parquet.read_metadata(path)
        for group in range(metadata.num_row_groups):
            self._group_rows = max(self._group_rows, metadata.row_group(group).num_rows)
        return describe_file(path, metadata.num_rows)
