"""Files that say one thing and are another: refused by a sentence, before they cost memory."""

import io
import json
import os
import socket
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from phalanx.data.chunks import decode_chunk
from phalanx.data.formats.idx_files import IdxArrays
from phalanx.data.formats.npz_files import NpzArrays
from phalanx.data.formats.safetensors_files import SafetensorsArrays
from phalanx.data.ingest import ingest
from phalanx.data.linking import Digests
from phalanx.data.manifest import DatasetManifest
from phalanx.data.opening import FORMATS
from phalanx.data.options import IngestOptions
from phalanx.data.raw_rows import RawRows
from phalanx.errors import DataLoss, InvalidArgument, NotFound

DEEP = b"[" * 100_000
MIB = 1024 * 1024


def _file(header: bytes, body: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + body


def _tensors(shape: list[int], stop: int, body: bytes = b"") -> bytes:
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, stop]}
    header = {"__metadata__": {"kind": "dense"}, "features": entry, "targets": entry}
    return _file(json.dumps(header).encode(), body)


def test_a_manifest_nested_without_end_is_no_manifest() -> None:
    with pytest.raises(DataLoss, match="not a data set manifest"):
        DatasetManifest.from_json(DEEP)


def test_headers_nested_without_end_are_no_headers(tmp_path: Path) -> None:
    with pytest.raises(DataLoss, match="not a chunk"):
        decode_chunk(_file(DEEP), "chunk")
    path = tmp_path / "deep.safetensors"
    path.write_bytes(_file(DEEP))
    with pytest.raises(InvalidArgument, match="not a safetensors file"):
        SafetensorsArrays(path, IngestOptions())


@pytest.mark.parametrize(
    "shape",
    [[2**31, 2**31], [2**32, 2**32], [2**62, 4], [-1], [-1, -1], [2**64], [0, 2**63]],
)
def test_shapes_that_do_not_fit_the_bytes_allocate_nothing(
    tmp_path: Path, shape: list[int]
) -> None:
    path = tmp_path / "huge.safetensors"
    path.write_bytes(_tensors(shape, 16, bytes(16)))
    tracemalloc.start()
    try:
        with pytest.raises(DataLoss):
            decode_chunk(_tensors(shape, 16, bytes(16)), "chunk")
        with pytest.raises(InvalidArgument):
            SafetensorsArrays(path, IngestOptions())
        assert tracemalloc.get_traced_memory()[1] < MIB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("extents", [(3, 2**32 - 1, 2**32 - 1), (3, 65536, 65536, 65536, 65536)])
def test_images_larger_than_any_file_are_cut_off(tmp_path: Path, extents: tuple[int, ...]) -> None:
    images, labels = tmp_path / "images", tmp_path / "labels"
    shape = b"".join(extent.to_bytes(4, "big") for extent in extents)
    images.write_bytes(bytes([0, 0, 8, len(extents)]) + shape + bytes(100))
    labels.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 0, 1, 2]))
    tracemalloc.start()
    try:
        with pytest.raises(InvalidArgument, match="images ends after row 0 of 3"):
            list(IdxArrays(images, labels).batches())
        assert tracemalloc.get_traced_memory()[1] < 40 * MIB
    finally:
        tracemalloc.stop()


def test_an_archive_that_unfolds_beyond_its_shape_is_read_no_further(tmp_path: Path) -> None:
    """Arrays in Fortran order are read whole: as much as their shape says, and no more."""
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for key in ("X", "y"):
            header = io.BytesIO()
            shape = (4, 2) if key == "X" else (4,)
            np.lib.format.write_array_header_1_0(
                header, {"descr": "<f4", "fortran_order": key == "X", "shape": shape}
            )
            body = bytes(48 * MIB) if key == "X" else bytes(16)
            archive.writestr(f"{key}.npy", header.getvalue() + body)
    tracemalloc.start()
    try:
        with pytest.raises(InvalidArgument, match="does not have the bytes of its shape"):
            list(NpzArrays(path, "X", "y").batches())
        assert tracemalloc.get_traced_memory()[1] < 8 * MIB
    finally:
        tracemalloc.stop()


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(InvalidArgument) as caught:
        ingest(path, IngestOptions(**options), Digests())
    return caught.value.message


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    """Nobody writes into it: whoever opened it would wait without end."""
    path = tmp_path / "rows.csv"
    os.mkfifo(path)
    return path


@pytest.mark.parametrize("format_name", [None, *FORMATS])
def test_a_pipe_is_refused_before_it_is_opened(pipe: Path, format_name: str | None) -> None:
    assert refused(pipe, format=format_name) == (
        f"{pipe} is a pipe, and data are read more than once; "
        "write them to a file first and name that"
    )


@pytest.mark.parametrize("split", ["test", "validation"])
def test_a_pipe_is_no_split_and_no_part_of_a_folder(pipe: Path, split: str) -> None:
    good = pipe.with_name("good.csv")
    good.write_text("x,y\n1,0\n2,1\n")
    assert "rows.csv is a pipe" in refused(good, **{split: pipe})
    assert "rows.csv is a pipe" in refused(pipe.parent, format="csv")


def test_a_pipe_holds_no_labels(tmp_path: Path) -> None:
    images, labels = tmp_path / "a-images-idx3-ubyte", tmp_path / "a-labels-idx1-ubyte"
    images.write_bytes(bytes([0, 0, 8, 3, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 7]))
    os.mkfifo(labels)
    assert "a-labels-idx1-ubyte is a pipe" in refused(images)


def test_a_descriptor_of_a_pipe_is_refused_and_one_of_a_file_is_read(tmp_path: Path) -> None:
    """As a shell gives them with <(…) and with < FILE."""
    reading, writing = os.pipe()
    try:
        assert f"/dev/fd/{reading} is a pipe" in refused(Path(f"/dev/fd/{reading}"), format="csv")
    finally:
        os.close(reading)
        os.close(writing)
    path = tmp_path / "rows.csv"
    path.write_text("x,y\n1,0\n2,1\n")
    with path.open() as file:
        opened = Path(f"/dev/fd/{file.fileno()}")
        manifest = ingest(opened, IngestOptions(format="csv"), Digests())
    assert manifest.rows("train") == 2


def test_devices_sockets_and_paths_that_are_none_are_refused(tmp_path: Path) -> None:
    assert "/dev/null is a device" in refused(Path("/dev/null"), format="csv")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        assert "is a socket" in refused(tmp_path / "s", format="csv")
    assert "cannot read 'a\\x00b'" in refused(Path("a\0b"), format="csv")
    assert "name too long" in refused(tmp_path / ("a" * 300), format="csv")
    (tmp_path / "file").touch()
    with pytest.raises(NotFound, match="there is no file"):
        ingest(tmp_path / "file" / "a.csv", IngestOptions(), Digests())


def test_rows_to_predict_come_from_a_file(pipe: Path) -> None:
    rows = RawRows((), features=1, dtype="float32", sparse=False, target="y")
    with pytest.raises(InvalidArgument, match=r"rows\.csv is a pipe"):
        rows.encode(pipe)
    with pytest.raises(InvalidArgument, match="is a folder; name a file of rows in it"):
        rows.encode(pipe.parent)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "it is too short"),
        (b"garbage", "it is too short"),
        (b"garbage, and no tensor at all", "it does not start with the length of a header"),
        (bytes(100), "it does not start with the length of a header"),
        ((1000).to_bytes(8, "little") + b"{}", "it does not start with the length of a header"),
        (_file(b"{no}"), "its header is no JSON"),
        (_file(b"[]"), "its header does not describe tensors"),
        (_file(b'{"a": 5}'), "its header does not describe tensors"),
        (_file(b"{}", b"x" * 50), "its last 50 bytes belong to no tensor"),
        (_tensors([4], 16, bytes(15)), "tensor 'features' reaches past the end of the file"),
    ],
)
def test_what_is_no_safetensors_file_is_not_asked_for_its_tensors(
    tmp_path: Path, content: bytes, why: str
) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    expected = f"a.safetensors is not a safetensors file, or is damaged: {why}"
    assert refused(path) == expected


def test_files_that_hold_nothing_say_so(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(_file(b"{}"))
    assert refused(path) == "a.safetensors holds no tensors"
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "nothing")
    assert refused(path) == "a.npz is not an NPZ file: it is an archive without arrays"


@pytest.mark.parametrize("header", ["{'descr': (", "{'shape': (8,), : 1}", "{" * 30])
def test_an_array_whose_header_is_no_literal_is_none(tmp_path: Path, header: str) -> None:
    path = tmp_path / "a.npz"
    size = len(header).to_bytes(2, "little")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("X.npy", b"\x93NUMPY\1\0" + size + header.encode())
    assert refused(path).startswith("a.npz is not an NPZ file: ")


def test_what_arrow_cannot_read_is_no_parquet_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A schema can be damaged so that it asks for types that Arrow knows of and does not have."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"x": [1.0, 2.0], "y": [0, 1]}), path)

    def unread(*_: Any, **__: Any) -> None:
        raise pa.ArrowNotImplementedError("Integers with more than 64 bits not implemented")

    monkeypatch.setattr(pq, "ParquetFile", unread)
    assert refused(path) == (
        "a.parquet is not a Parquet file: Integers with more than 64 bits not implemented"
    )


def test_a_column_whose_name_is_no_text_is_no_parquet_file(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"weight": [1.0, 2.0], "y": [0, 1]}), path)
    path.write_bytes(path.read_bytes().replace(b"weight", b"\xf8eight"))
    assert refused(path) == "a.parquet is not a Parquet file: the name of a column is not UTF-8"


@pytest.mark.parametrize(("at", "value"), [(6, 128), (8, 1)], ids=["a later ZIP", "a password"])
def test_an_archive_that_python_cannot_open_is_no_npz(tmp_path: Path, at: int, value: int) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, X=np.ones((4, 2)), y=np.arange(4) % 2)
    content = bytearray(path.read_bytes())
    for name in (b"X.npy", b"y.npy"):
        # The last time that it is named is in the listing, after 46 bytes about it.
        content[content.rindex(name) - 46 + at] = value
    path.write_bytes(content)
    assert refused(path).startswith("a.npz is not an NPZ file: ")
