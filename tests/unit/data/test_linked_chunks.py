"""Linked chunks: made again from the user's Parquet files, to the bytes that copying stores."""

import errno
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from phalanx.data.formats.parquet_rows import DecodedBatches
from phalanx.data.ingest import ingest, ingest_arrays
from phalanx.data.link_plans import places_of, plan_of
from phalanx.data.linked_chunks import ChunkMaker, OpenFiles
from phalanx.data.linked_files import AWAY, CHANGED, NOT_ALLOWED, UNREADABLE
from phalanx.data.linking import LARGE_GROUP_ROWS, Digests
from phalanx.data.manifest import DatasetManifest
from phalanx.data.options import IngestOptions
from phalanx.errors import (
    FailedPrecondition,
    InvalidArgument,
    PhalanxError,
    Unavailable,
    Unimplemented,
)
from phalanx.testing.storage_messages import digest_of

KEPT_BYTES = 1 << 20


def people(rows: int = 5000, seed: int = 1, missing: bool = True) -> pa.Table:
    """Numbers, categories and a target; some cells are missing."""
    generator = np.random.default_rng(seed)
    hole = generator.random(rows) < (0.1 if missing else 0)
    words = np.array(["red", " green", "blue", "?"] if missing else ["red", "green", "blue"])
    return pa.table(
        {
            "age": pa.array(generator.integers(1, 99, rows), mask=hole),
            "size": generator.normal(size=rows),
            "colour": words[generator.integers(0, len(words), rows)],
            "city": pa.array(generator.choice(["a", "b"], rows)).dictionary_encode(),
            "member": generator.random(rows) < 0.5,
            "label": generator.choice(["yes.", "no"], rows),
        }
    )


def write(path: Path, table: pa.Table, group: int = 700) -> Path:
    pyarrow.parquet.write_table(table, path, row_group_size=group)
    return path


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[OpenFiles]:
    files = OpenFiles([str(tmp_path)], KEPT_BYTES)
    yield files
    files.close()


def made(manifest: DatasetManifest, files: OpenFiles) -> dict[str, bytes]:
    """All chunks of a linked manifest, made from its plan as it crosses to another process."""
    plan = DatasetManifest.from_json(plan_of(manifest).to_json())
    maker = ChunkMaker(plan, files)
    return {digest: maker.make(place) for digest, (place, *_) in places_of(manifest).items()}


@pytest.mark.parametrize(
    "options",
    [
        {"missing": "category", "trim_labels": "."},
        {"missing": "mean", "test": 0.2, "validation": 0.13, "seed": 5},
        {"missing": "category", "test": 0.37, "layout": "csr"},
        {"missing": "mean", "dtype": "float64", "target": "size"},
        {"missing": "mean", "target": "age", "ignore": ("age",), "categorical": ("member",)},
        {"missing": "category", "target": "member", "test": 0.1},
        {"missing": "mean", "target": "size", "task": "regression", "test": 0.2},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_chunks_are_those_that_copying_stores(
    tmp_path: Path, opened: OpenFiles, options: dict[str, Any]
) -> None:
    if options.get("target") == "age":
        options = {**options, "target": "size", "ignore": ("age", "label")}
    files = [write(tmp_path / "1.parquet", people()), write(tmp_path / "2.parquet", people(900, 2))]
    chosen = {**options, "chunk_bytes": 20_000}
    copied = ingest(files, IngestOptions(**chosen), Digests())
    linked = ingest(files, IngestOptions(**chosen, link=True), Digests())
    assert replace(linked, links=None) == copied
    assert DatasetManifest.from_json(linked.to_json()) == linked
    assert len(linked.digests()) > 5
    for digest, data in made(linked, opened).items():
        assert digest_of(data) == digest


def test_a_split_with_files_of_its_own(tmp_path: Path, opened: OpenFiles) -> None:
    train = write(tmp_path / "train.parquet", people())
    test = write(tmp_path / "test.parquet", people(1500, 3), group=100)
    chosen = {"missing": "category", "test": [str(test)], "validation": 0.1, "chunk_bytes": 9000}
    copied = ingest(train, IngestOptions(**chosen), Digests())
    linked = ingest(train, IngestOptions(**chosen, link=True), Digests())
    assert linked.digests() == copied.digests()
    assert set(linked.splits) == {"train", "validation", "test"}
    assert [digest_of(data) for data in made(linked, opened).values()] == list(linked.digests())


def test_chunks_in_any_order_with_nothing_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", people(missing=False), group=4000)
    options = IngestOptions(link=True, test=0.3, chunk_bytes=10_000)
    linked = ingest(path, options, Digests())
    places = places_of(linked)
    for kept_bytes in (0, 5000, 1 << 24):
        files = OpenFiles([str(tmp_path)], kept_bytes)
        maker = ChunkMaker(plan_of(linked), files)
        for digest in sorted(places) + sorted(places, reverse=True):
            assert digest_of(maker.make(places[digest][0])) == digest
        files.close()


def test_kept_batches_have_a_limit() -> None:
    batch = pa.RecordBatch.from_arrays([pa.array(np.zeros(100))], ["a"])
    kept = DecodedBatches(3 * batch.nbytes)
    for index in range(5):
        kept.put((index,), batch)
        assert kept.get((0,) if index < 3 else (index,)) is batch
    there = [kept.get((index,)) is not None for index in range(5)]
    assert there == [True, False, False, True, True]
    kept.put(("large",), pa.RecordBatch.from_arrays([pa.array(np.zeros(1000))], ["a"]))
    assert kept.get(("large",)) is None
    assert kept.get((0,)) is batch


@pytest.fixture
def linked(tmp_path: Path) -> DatasetManifest:
    write(tmp_path / "a.parquet", people())
    options = IngestOptions(link=True, missing="category", chunk_bytes=20_000)
    return ingest(tmp_path / "a.parquet", options, Digests())


def refusal(manifest: DatasetManifest, files: OpenFiles) -> PhalanxError:
    with pytest.raises(FailedPrecondition) as caught:
        made(manifest, files)
    return caught.value


def grow(path: Path) -> None:
    write(path, people(5001))


def remove(path: Path) -> None:
    path.unlink()


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def make_link(path: Path) -> None:
    path.rename(path.with_name("moved.parquet"))
    path.symlink_to(path.with_name("moved.parquet"))


def cut(path: Path) -> None:
    os.truncate(path, 3)


def other_columns(path: Path) -> None:
    write(path, people().drop_columns(["city"]))


@pytest.mark.parametrize(
    ("change", "reason", "words"),
    [
        (grow, CHANGED, "is not the file that was linked"),
        (cut, CHANGED, "it has 3 bytes"),
        (other_columns, CHANGED, "is not the file that was linked"),
        (remove, UNREADABLE, "there is no such file where it runs"),
        (make_folder, UNREADABLE, "is not a regular file"),
        (make_pipe, UNREADABLE, "is not a regular file"),
        (make_link, UNREADABLE, "symbolic link"),
    ],
)
def test_a_file_that_changed_is_named(
    tmp_path: Path,
    opened: OpenFiles,
    linked: DatasetManifest,
    change: Callable[[Path], None],
    reason: str,
    words: str,
) -> None:
    made(linked, opened)
    change(tmp_path / "a.parquet")
    error = refusal(linked, opened)
    assert error.reason == reason
    assert str(tmp_path / "a.parquet") in error.message
    assert words in error.message


class Failing(io.FileIO):
    """A file on a disk that may be away."""

    error: OSError | MemoryError | None = None

    def readinto(self, buffer: Any) -> int:
        if Failing.error is not None:
            raise Failing.error
        return super().readinto(buffer)

    def read(self, size: int | None = -1) -> bytes:
        if Failing.error is not None:
            raise Failing.error
        return super().read(-1 if size is None else size)


PASSING = [
    OSError(errno.EIO, "Input/output error"),
    OSError(errno.ESTALE, "Stale file handle"),
    OSError(errno.EAGAIN, "Try again"),
    OSError(errno.ENOTCONN, "Transport endpoint is not connected"),
    MemoryError("malloc of 1000 bytes failed"),
]


@pytest.mark.parametrize("error", PASSING, ids=repr)
@pytest.mark.parametrize("when", ["opening", "reading"])
def test_a_disk_that_is_away_says_nothing_of_a_file(
    tmp_path: Path,
    linked: DatasetManifest,
    monkeypatch: pytest.MonkeyPatch,
    error: OSError | MemoryError,
    when: str,
) -> None:
    monkeypatch.setattr("os.fdopen", lambda descriptor, *_, **__: Failing(descriptor))
    monkeypatch.setattr(Failing, "error", error if when == "opening" else None)
    files = OpenFiles([str(tmp_path)], 0)
    maker = ChunkMaker(plan_of(linked), files)
    places = places_of(linked)
    digest, (place,) = list(places.items())[-1]
    if when == "reading":
        maker.check()
        Failing.error = error
    with pytest.raises(Unavailable, match=r"a\.parquet") as caught:
        maker.make(place)
    assert caught.value.reason == AWAY
    Failing.error = None
    assert digest_of(maker.make(place)) == digest
    files.close()


@pytest.mark.parametrize("call", ["open", "pread", "fstat"])
def test_a_disk_that_is_away_when_a_file_is_looked_at(
    opened: OpenFiles, linked: DatasetManifest, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(f"phalanx.data.linked_files.os.{call}", fail)
        with pytest.raises(Unavailable, match="stale file handle"):
            made(linked, opened)
    assert made(linked, opened)


def test_the_same_content_at_the_same_path_is_the_same_file(
    tmp_path: Path, opened: OpenFiles, linked: DatasetManifest
) -> None:
    before = made(linked, opened)
    path = tmp_path / "a.parquet"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    os.utime(path, (0, 0))
    assert made(linked, opened) == before


def test_values_that_changed_in_place_give_other_bytes(tmp_path: Path, opened: OpenFiles) -> None:
    table = pa.table({"x": np.zeros(1000), "y": np.arange(1000.0)})
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(
        table, path, use_dictionary=False, compression="none", write_statistics=False
    )
    linked = ingest(path, IngestOptions(link=True, task="regression"), Digests())
    (before,) = made(linked, opened).values()
    content = path.read_bytes()
    place = content.index(np.arange(500.0, 510.0).tobytes())
    path.write_bytes(content[:place] + np.full(10, 7.0).tobytes() + content[place + 80 :])
    (after,) = made(linked, opened).values()
    assert digest_of(before) in linked.digests()
    assert digest_of(after) not in linked.digests()


def test_only_below_the_folders_that_were_named(tmp_path: Path, linked: DatasetManifest) -> None:
    assert linked.links is not None
    inside = tmp_path / "inside"
    inside.mkdir()
    for roots in ([], [str(inside)], [str(tmp_path / "a")]):
        error = refusal(linked, OpenFiles(roots, 0))
        assert error.reason == NOT_ALLOWED
    assert "--link-root" in error.message
    (inside / "out").symlink_to(tmp_path)
    for path in (
        f"{inside}/out/a.parquet",
        f"{inside}/../a.parquet",
        f"{inside}//a.parquet",
        "a.parquet",
        f"{inside}/a\0",
    ):
        file = replace(linked.links.files[0], path=path)
        wrong = replace(linked, links=replace(linked.links, files=(file,)))
        assert refusal(wrong, OpenFiles([str(inside)], 0)).reason in {NOT_ALLOWED, UNREADABLE}


def test_a_folder_may_be_named_by_a_link_and_a_file_added_by_one(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "data").symlink_to(tmp_path / "disk")
    write(tmp_path / "data" / "a.parquet", people())
    options = IngestOptions(link=True, missing="category")
    linked = ingest(tmp_path / "data" / "a.parquet", options, Digests())
    assert linked.links is not None
    assert linked.links.files[0].path == str(tmp_path / "disk" / "a.parquet")
    files = OpenFiles([str(tmp_path / "data")], 0)
    assert [digest_of(data) for data in made(linked, files).values()] == list(linked.digests())
    files.close()


def test_rows_beyond_one_chunk_are_refused(linked: DatasetManifest, opened: OpenFiles) -> None:
    assert linked.links is not None
    digest, (place,) = next(iter(places_of(linked).items()))
    maker = ChunkMaker(plan_of(linked), opened)
    assert digest_of(maker.make(place)) == digest
    assert maker.make(replace(place, first=10_000, stop=20_000)) == b""
    wide = replace(linked.links.files[0], rows=6000)
    for _ in range(2):
        with pytest.raises(FailedPrecondition, match="has 5,000 rows"):
            opened.open(wide)


def test_what_cannot_be_linked(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b\n1,2\n2,3\n")
    write(tmp_path / "a.parquet", people(missing=False))
    with pytest.raises(
        InvalidArgument, match="only Parquet files can be linked, not csv"
    ) as caught:
        ingest(tmp_path / "a.csv", IngestOptions(link=True), Digests())
    assert caught.value.violations[0].field == "link"
    held_out = IngestOptions(link=True, test=str(tmp_path / "a.csv"), format=None)
    with pytest.raises(InvalidArgument, match="only Parquet files can be linked"):
        ingest(tmp_path / "a.parquet", held_out, Digests())
    with pytest.raises(InvalidArgument, match="not objects in memory"):
        ingest_arrays(np.zeros((4, 2)), [0, 1, 0, 1], IngestOptions(link=True), Digests())
    for link in (True, False):
        with pytest.raises(Unimplemented, match="s3://bucket/key: this version reads no objects"):
            ingest("s3://bucket/key", IngestOptions(link=link), Digests())


def test_a_file_that_changes_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.parquet", people(missing=False))

    class Changing(Digests):
        def put(self, data: bytes) -> str:
            write(path, people(4999, missing=False))
            return super().put(data)

    monkeypatch.setattr("phalanx.data.ingest.Digests", Changing)
    with pytest.raises(PhalanxError, match="was changed while it was read"):
        ingest(path, IngestOptions(link=True), Digests())


def test_large_row_groups_are_remarked_on(tmp_path: Path) -> None:
    rows = LARGE_GROUP_ROWS + 1
    table = pa.table({"x": np.zeros(rows), "y": np.arange(float(rows))})
    small = write(tmp_path / "a.parquet", table, group=1000)
    large = write(tmp_path / "b.parquet", table, group=rows)
    options = IngestOptions(link=True, task="regression")
    assert ingest(small, options, Digests()).notes == (
        "the target is the last column, 'y' (option `target` overrules)",
    )
    assert "the largest has 262,145 rows" in ingest(large, options, Digests()).notes[-1]
