"""What can be said about a data set when it is added."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from phalanx.data.manifest import MissingPolicy, Task
from phalanx.errors import InvalidArgument, Violation

MEBIBYTE = 1024 * 1024
CHUNK_BYTES_MAXIMUM = 16 * MEBIBYTE - 64 * 1024
"""Rows of a chunk take at most this; the rest of 16 MiB is for its header."""

PIECE_ROWS = 2048
"""Rows that the sampler keeps together; larger chunks would be fetched once for each piece."""

MISSING_MARKERS = ("", "?", "NA", "N/A", "NaN", "nan", "null", "NULL")
"""A cell that reads like one of these, after trimming, is a missing value."""

Layout = Literal["auto", "dense", "csr"]


@dataclass(frozen=True)
class ChunkSize:
    """A chunk ends with `PIECE_ROWS` rows, or as soon after as it has ``least_bytes``; in any case
    before the row that would take it over ``most_bytes``."""

    least_bytes: int
    most_bytes: int


@dataclass(frozen=True)
class IngestOptions:
    """Every choice has a default that suits most files; the manifest's notes say what was assumed.

    ``format`` is one of csv, parquet, npz, libsvm, safetensors, idx; None goes by the file's
    ending. ``target`` is a column by name, by number from 1, or by number from the end (-1 is the
    last, the default). ``test`` and ``validation`` are a fraction of the rows, or files that hold
    the split. ``missing`` says what happens to missing values: ``error``; ``category`` (a category
    of its own, the mean in numeric columns); ``mean`` (the mean of the column's features, also in
    categorical ones).

    Tables: ``header`` None looks at the first row; ``columns`` gives names; ``delimiter`` None
    tells comma, semicolon and tab apart; lines that start with ``comment`` are skipped;
    ``trim_labels`` are characters that are cut off from the end of the target's words;
    ``categorical`` and ``numeric`` overrule the guess, ``ignore`` leaves columns out; a categorical
    column has at most ``max_categories`` words.

    Arrays: ``features_key`` and ``target_key`` name the arrays of an NPZ or safetensors file;
    ``feature_count`` is the width of LIBSVM data when the highest index does not tell.

    Storage: ``layout`` auto keeps sparse data sparse (``csr``); ``dtype`` is float32 or float64
    (whole bytes such as pixels are stored as bytes either way); ``chunk_bytes`` is the size of a
    chunk, None what the sampler reads at a time: `PIECE_ROWS` rows, but 1 to 4 MiB;
    ``block_bytes`` is how much of a text file is parsed at once, without influence on the result.
    """

    format: str | None = None
    target: str | int | None = None
    task: Task | None = None
    test: float | str | Path | Sequence[str | Path] | None = None
    validation: float | str | Path | Sequence[str | Path] | None = None
    seed: int = 0
    missing: MissingPolicy = "error"
    missing_markers: tuple[str, ...] = MISSING_MARKERS
    header: bool | None = None
    columns: tuple[str, ...] = ()
    delimiter: str | None = None
    comment: str | None = None
    trim_labels: str = ""
    categorical: tuple[str, ...] = ()
    numeric: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    max_categories: int = 1000
    features_key: str | None = None
    target_key: str | None = None
    feature_count: int | None = None
    layout: Layout = "auto"
    dtype: str = "float32"
    chunk_bytes: int | None = None
    block_bytes: int = MEBIBYTE
    link: bool = False

    def __post_init__(self) -> None:
        violations = list(self._violations())
        if violations:
            text = "; ".join(f"{wrong.field}: {wrong.message}" for wrong in violations)
            raise InvalidArgument(text, violations=violations)

    @staticmethod
    def from_mapping(values: Mapping[str, Any]) -> "IngestOptions":
        """Options by name, as programs hand them on; raises InvalidArgument for an unknown name."""
        known = {field.name for field in fields(IngestOptions)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise InvalidArgument(
                f"unknown option {', '.join(unknown)}; the options are {', '.join(sorted(known))}"
            )
        return IngestOptions(**values)

    def chunk_size(self) -> ChunkSize:
        """After how many bytes and rows chunks end."""
        if self.chunk_bytes is None:
            return ChunkSize(MEBIBYTE, 4 * MEBIBYTE)
        return ChunkSize(self.chunk_bytes, self.chunk_bytes)

    def fraction(self, split: Literal["test", "validation"]) -> float:
        """The fraction of the rows that goes to the split; 0 where files hold it, or nothing."""
        value = self.test if split == "test" else self.validation
        return float(value) if isinstance(value, int | float) else 0.0

    def paths(self, split: Literal["test", "validation"]) -> tuple[Path, ...]:
        """The files that hold the split."""
        value = self.test if split == "test" else self.validation
        if value is None or isinstance(value, int | float):
            return ()
        if isinstance(value, str | Path):
            return (Path(value),)
        return tuple(Path(path) for path in value)

    def _violations(self) -> list[Violation]:
        wrong = [
            Violation(name, f"is a whole number, not {getattr(self, name)!r}")
            for name in ("seed", "max_categories", "block_bytes")
            if not isinstance(getattr(self, name), int)
        ]
        if wrong:
            return wrong

        def check(good: bool, name: str, message: str) -> None:
            if not good:
                wrong.append(Violation(name, message))

        for split in ("test", "validation"):
            value = getattr(self, split)
            if isinstance(value, int | float):
                check(0 < value < 1, split, f"a fraction lies between 0 and 1, not at {value}")
        both = self.fraction("test") + self.fraction("validation")
        check(
            both < 1 or bool(wrong),
            "validation",
            f"test and validation take {both:g} of the rows; leave some to train",
        )
        check(
            self.missing in ("error", "category", "mean"),
            "missing",
            f"is error, category or mean, not {self.missing!r}",
        )
        check(
            self.task in (None, "classification", "regression"),
            "task",
            f"is classification or regression, not {self.task!r}",
        )
        check(self.dtype in ("float32", "float64"), "dtype", "is float32 or float64")
        check(self.layout in ("auto", "dense", "csr"), "layout", "is auto, dense or csr")
        check(
            self.chunk_bytes is None or 1024 <= self.chunk_bytes <= CHUNK_BYTES_MAXIMUM,
            "chunk_bytes",
            f"is 1024 to {CHUNK_BYTES_MAXIMUM}, not {self.chunk_bytes}",
        )
        check(self.block_bytes >= 64, "block_bytes", "is at least 64")
        check(self.max_categories >= 2, "max_categories", "is at least 2")
        check(0 <= self.seed < 2**63, "seed", "is 0 to 2^63 - 1")
        for name in ("delimiter", "comment"):
            value = getattr(self, name)
            check(value is None or len(value.encode()) == 1, name, "is one character")
        check(self.target != 0, "target", "columns are numbered from 1, or from the end with -1")
        both_kinds = sorted(set(self.categorical) & set(self.numeric))
        check(not both_kinds, "categorical", f"{', '.join(both_kinds)} cannot be numeric as well")
        return wrong
