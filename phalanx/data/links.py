"""What a manifest says of data that stays where it is.

The chunks of a linked data set are not stored. They are encoded again whenever someone reads them,
from the rows of the user's Parquet files that the manifest names. Columns, vocabularies and classes
are in the manifest anyway; here is the rest of what it takes to make the same bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LinkedFile:
    """A Parquet file as it was when it was linked.

    ``path`` is absolute and without symbolic links. ``footer_sha256`` is that of the file's footer,
    which says where everything in it lies. Times are left out: what counts is the content.
    """

    path: str
    size_bytes: int
    rows: int
    footer_sha256: str


@dataclass(frozen=True)
class Links:
    """Where the rows of every chunk lie.

    ``files`` hold the train split and, by the fractions ``test`` and ``validation``, what is dealt
    to the others; ``held_out`` are the files of a split that has its own. ``ranges`` has for each
    chunk of each split, in order, the first row of its files that it holds and the one after the
    last; rows between that were dealt to another split do not count. ``trim_labels`` is the option
    of that name.
    """

    files: tuple[LinkedFile, ...]
    ranges: Mapping[str, tuple[tuple[int, int], ...]]
    held_out: Mapping[str, tuple[LinkedFile, ...]]
    test: float = 0.0
    validation: float = 0.0
    trim_labels: str = ""

    def files_of(self, split: str) -> tuple[LinkedFile, ...]:
        """The files that the rows of a split lie in."""
        return self.held_out.get(split, self.files)

    def all_files(self) -> tuple[LinkedFile, ...]:
        """All files, each once."""
        held_out = (file for split in sorted(self.held_out) for file in self.held_out[split])
        return tuple(dict.fromkeys((*self.files, *held_out)))


def links_from(document: Mapping[str, Any]) -> Links:
    """Links from their JSON form."""
    return Links(
        files=_files_from(document["files"]),
        ranges={
            split: tuple((int(first), int(stop)) for first, stop in ranges)
            for split, ranges in document["ranges"].items()
        },
        held_out={split: _files_from(files) for split, files in document["held_out"].items()},
        test=document["test"],
        validation=document["validation"],
        trim_labels=document["trim_labels"],
    )


def _files_from(documents: Sequence[Mapping[str, Any]]) -> tuple[LinkedFile, ...]:
    return tuple(LinkedFile(**document) for document in documents)
