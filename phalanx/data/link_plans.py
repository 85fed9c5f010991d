"""What of a linked manifest it takes to make its chunks, and where each lies.

Apart from the code that makes them, so that a service can hand plans on without loading it.
"""

from dataclasses import dataclass, replace

from phalanx.data.manifest import DatasetManifest, Statistics

_FILE_S = 0.5
_CHUNKS_PER_S = 2000.0
_BYTES_PER_S = 4e6

_PLACES = 8
"""Of one chunk: where a file is constant all its chunks may be equal."""


@dataclass(frozen=True, slots=True)
class ChunkPlace:
    """Where a chunk comes from: rows [first, stop) of the files of a split."""

    split: str
    first: int
    stop: int


def plan_of(manifest: DatasetManifest) -> DatasetManifest:
    """What of a linked manifest is needed to make any of its chunks: all but the chunks."""
    assert manifest.links is not None
    return replace(
        manifest,
        splits={},
        statistics=Statistics(0),
        source=(),
        notes=(),
        links=replace(manifest.links, ranges={}),
    )


def checking_s(manifest: DatasetManifest) -> float:
    """How long a service may take to look at what a manifest links, in seconds; 0 for nothing.

    It opens all files, makes the first chunk of each split, and notes all chunks: on a slow share,
    and on a slow disk.
    """
    links = manifest.links
    if links is None:
        return 0.0
    chunks = sum(map(len, manifest.splits.values()))
    seconds = len(links.all_files()) * _FILE_S + chunks / _CHUNKS_PER_S
    for split, ranges in links.ranges.items():
        files = links.files_of(split)
        rows = sum(file.rows for file in files)
        if ranges and rows:
            part = ranges[0][1] / rows
            seconds += part * sum(file.size_bytes for file in files) / _BYTES_PER_S
    return seconds


def places_of(manifest: DatasetManifest) -> dict[str, tuple[ChunkPlace, ...]]:
    """Where each chunk of a linked manifest comes from, by its digest; equal chunks have several
    places.

    Raises ValueError where there is not one place for each chunk, or a split without any, and where
    places are empty, overlap, or lie past the rows that the manifest gives the split's files. So it
    has no more chunks than rows; that the files have these is for whoever opens them to check.
    """
    assert manifest.links is not None
    if not all(manifest.splits.values()):
        raise ValueError("a split has no chunk")
    for split in manifest.splits:
        end, rows = 0, sum(file.rows for file in manifest.links.files_of(split))
        for first, stop in manifest.links.ranges[split]:
            if not end <= first < stop <= rows:
                raise ValueError(
                    f"rows {first} to {stop} of split {split} overlap others, or are not all among "
                    f"the {rows} of its files"
                )
            end = stop
    places: dict[str, tuple[ChunkPlace, ...]] = {}
    for split, chunks in manifest.splits.items():
        for chunk, (first, stop) in zip(chunks, manifest.links.ranges[split], strict=True):
            known = places.get(chunk.digest, ())
            if len(known) < _PLACES:
                places[chunk.digest] = (*known, ChunkPlace(split, first, stop))
    return places
