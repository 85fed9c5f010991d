"""What a stored data set is: its columns, classes, splits, chunks and statistics.

The manifest is one JSON blob. Its bytes are canonical (sorted keys, no spaces), so equal data sets
have equal digests. Chunks are named by the SHA-256 of their content; the manifest therefore
checksums all of the data.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from phalanx.data.links import Links, links_from
from phalanx.errors import DataLoss

MANIFEST_VERSION = 1

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

ColumnKind = Literal["numeric", "categorical"]
MissingPolicy = Literal["error", "category", "mean"]
Task = Literal["classification", "regression"]
Format = Literal["dense", "csr"]
ClassKind = Literal["text", "integer", "number", "boolean"]


@dataclass(frozen=True)
class Column:
    """One raw input column and how it becomes features.

    A numeric column is one feature. A categorical one is a feature per word of ``vocabulary`` (one
    of them is 1, or none when the word is unknown) and, with ``missing_category``, one more for a
    missing value. ``fill`` replaces a missing value under the policies that replace: the mean of a
    numeric column, the frequencies of a categorical one (the mean of its features); empty where a
    missing value is an error.
    """

    name: str
    kind: ColumnKind = "numeric"
    vocabulary: tuple[str, ...] = ()
    missing: MissingPolicy = "error"
    fill: tuple[float, ...] = ()
    missing_category: bool = False

    @property
    def width(self) -> int:
        """How many features the column becomes."""
        if self.kind == "numeric":
            return 1
        return len(self.vocabulary) + (1 if self.missing_category else 0)

    def feature_names(self) -> tuple[str, ...]:
        """``age``, or ``workclass=Private`` and so on."""
        if self.kind == "numeric":
            return (self.name,)
        words = tuple(f"{self.name}={word}" for word in self.vocabulary)
        return (*words, f"{self.name} is missing") if self.missing_category else words


@dataclass(frozen=True)
class ChunkInfo:
    """One chunk blob: ``digest`` is its hex SHA-256, ``nonzeros`` counts stored CSR values.

    ``class_rows`` are its rows of each class, in the order of the classes; empty for a regression.
    """

    digest: str
    rows: int
    size_bytes: int
    nonzeros: int = 0
    class_rows: tuple[int, ...] = ()


@dataclass(frozen=True)
class Statistics:
    """Per feature, over the train split only; ``count`` is its rows.

    ``std`` is the population standard deviation. The tuples are empty where the data set is too
    wide to keep statistics (see ``phalanx.data.statistics``).
    """

    count: int
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    minimum: tuple[float, ...] = ()
    maximum: tuple[float, ...] = ()


@dataclass(frozen=True)
class SourceFile:
    """Where the data came from: a file's name (not its path) and size."""

    name: str
    size_bytes: int


@dataclass(frozen=True)
class DatasetManifest:
    """All that is known of one version of a data set.

    ``features`` is the number of encoded features. ``columns`` are the raw columns in order; empty
    for data without column names (images, LIBSVM, plain arrays), whose features are taken by
    position and called ``x1`` … ``xN``. ``dtype`` is that of the stored features (``uint8``,
    ``float32`` or ``float64``); a leaf converts to its own. ``classes`` are the labels in the order
    of their indices, written as text; ``class_kind`` says what they were. Cells that read like one
    of ``missing_markers`` are missing values. ``notes`` tell a person what was assumed. ``links``
    is there where the chunks are not stored but encoded again from the files that it names.
    """

    format: Format
    dtype: str
    features: int
    task: Task
    target: str
    splits: Mapping[str, tuple[ChunkInfo, ...]]
    statistics: Statistics
    columns: tuple[Column, ...] = ()
    classes: tuple[str, ...] = ()
    class_kind: ClassKind = "text"
    missing_markers: tuple[str, ...] = ()
    source: tuple[SourceFile, ...] = ()
    seed: int = 0
    notes: tuple[str, ...] = field(default=())
    links: Links | None = None
    version: int = MANIFEST_VERSION

    def rows(self, split: str) -> int:
        """Rows of a split; 0 where it does not exist."""
        return sum(chunk.rows for chunk in self.splits.get(split, ()))

    def rows_by_split(self) -> dict[str, int]:
        """Rows of each split that has any."""
        return {split: self.rows(split) for split in SPLITS if self.rows(split)}

    def class_rows(self, split: str) -> tuple[int, ...]:
        """Rows of each class in a split; empty for a regression."""
        chunks = self.splits.get(split, ())
        return tuple(sum(rows) for rows in zip(*(each.class_rows for each in chunks), strict=True))

    @property
    def size_bytes(self) -> int:
        """Stored bytes of all chunks."""
        return sum(chunk.size_bytes for chunks in self.splits.values() for chunk in chunks)

    def digests(self) -> tuple[str, ...]:
        """Digests of all chunks, each once, in the order of the splits."""
        seen = {chunk.digest: None for split in SPLITS for chunk in self.splits.get(split, ())}
        return tuple(seen)

    def feature_names(self) -> tuple[str, ...]:
        """Names of the encoded features in order."""
        if self.columns:
            return tuple(name for column in self.columns for name in column.feature_names())
        return tuple(f"x{index + 1}" for index in range(self.features))

    def labels(self) -> tuple[str | int | float | bool, ...]:
        """The classes as what they were before they were written as text."""
        return tuple(label_from_text(text, self.class_kind) for text in self.classes)

    def to_json(self) -> bytes:
        """Canonical JSON."""
        document = asdict(self)
        if self.links is None:
            # As it was before there were links, so that what was added then keeps its digest.
            del document["links"]
        return json.dumps(
            document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        ).encode()

    @staticmethod
    def from_json(data: bytes | str) -> "DatasetManifest":
        """Reads what ``to_json`` wrote.

        Raises DataLoss when it is not a manifest, or one that a newer Phalanx wrote.
        """
        try:
            document = json.loads(data)
            if document["version"] != MANIFEST_VERSION:
                raise DataLoss(
                    f"the data set manifest has version {document['version']}, this Phalanx reads "
                    f"version {MANIFEST_VERSION}; add the data set again or use a matching release"
                )
            return _manifest_from(document)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataLoss(f"not a data set manifest: {error!r}") from error


def label_from_text(text: str, kind: ClassKind) -> str | int | float | bool:
    """A class label as what it was before it was written as text."""
    if kind == "integer":
        return int(text)
    if kind == "number":
        return float(text)
    if kind == "boolean":
        return text == "true"
    return text


def columns_from(documents: Sequence[Mapping[str, Any]]) -> tuple[Column, ...]:
    """Columns from their JSON form."""
    return tuple(
        Column(
            name=document["name"],
            kind=document["kind"],
            vocabulary=tuple(document["vocabulary"]),
            missing=document["missing"],
            fill=tuple(document["fill"]),
            missing_category=document["missing_category"],
        )
        for document in documents
    )


def statistics_from(document: Mapping[str, Any]) -> Statistics:
    """Statistics from their JSON form."""
    return Statistics(
        count=document["count"],
        mean=tuple(document["mean"]),
        std=tuple(document["std"]),
        minimum=tuple(document["minimum"]),
        maximum=tuple(document["maximum"]),
    )


def _chunk_from(document: Mapping[str, Any]) -> ChunkInfo:
    return ChunkInfo(**{**document, "class_rows": tuple(document["class_rows"])})


def _manifest_from(document: Mapping[str, Any]) -> DatasetManifest:
    known = {**document}
    known["columns"] = columns_from(document["columns"])
    known["statistics"] = statistics_from(document["statistics"])
    known["splits"] = {
        split: tuple(_chunk_from(chunk) for chunk in chunks)
        for split, chunks in document["splits"].items()
    }
    known["source"] = tuple(SourceFile(**source) for source in document["source"])
    known["missing_markers"] = tuple(document["missing_markers"])
    known["classes"] = tuple(document["classes"])
    known["notes"] = tuple(document["notes"])
    known["links"] = links_from(document["links"]) if "links" in document else None
    return DatasetManifest(**known)
