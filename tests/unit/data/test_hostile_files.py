"""Files that say one thing and are another: refused by a sentence, before they cost memory."""

import io
import json
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from phalanx.data.chunks import decode_chunk
from phalanx.data.formats.idx_files import IdxArrays
from phalanx.data.formats.npz_files import NpzArrays
from phalanx.data.formats.safetensors_files import SafetensorsArrays
from phalanx.data.manifest import DatasetManifest
from phalanx.data.options import IngestOptions
from phalanx.errors import DataLoss, InvalidArgument

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
