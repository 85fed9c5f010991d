"""Models as one file, for other programs."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from phalanx.errors import AlreadyExists, InvalidArgument
from phalanx.files import completed

_FIRST_TIME = (1980, 1, 1, 0, 0, 0)
_PICKLES = (".joblib", ".pickle", ".pkl")


def export_model(folder: Path, file: Path, *, allow_code: bool = False) -> None:
    """Write a downloaded model to ``file``; its ending chooses the format.

    ``.zip`` holds all files of the model, ``.safetensors`` and ``.npz`` the parameters only, by
    tensor name, and ``.onnx`` what predicts; that of a PyTorch module which brings code only with
    ``allow_code``. Raises AlreadyExists when there is such a file, InvalidArgument for another
    ending and for a model that becomes no ONNX file, and FailedPrecondition where a library is
    missing.
    """
    writers: dict[str, Callable[[Path, Path], None]] = {
        ".zip": _write_zip,
        ".safetensors": _write_safetensors,
        ".npz": _write_npz,
        ".onnx": partial(_write_onnx, allow_code=allow_code),
    }
    write = writers.get(file.suffix)
    if file.suffix in _PICKLES:
        raise InvalidArgument(
            f"{file} would be a pickle, which runs code in whoever loads it, so none is written "
            "here; in Python, cluster.models.to_sklearn(NAME) is an object that can be pickled"
        )
    if write is None:
        raise InvalidArgument(
            f"{file} ends in {file.suffix or 'nothing'}; write to one of {', '.join(writers)}"
        )
    if file.exists():
        raise AlreadyExists(f"{file} exists; give a name that is free")
    with completed(file) as unfinished:
        write(folder, unfinished)


def _write_zip(folder: Path, file: Path) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(item for item in folder.rglob("*") if item.is_file()):
            # Without times, so that the same model gives the same archive.
            entry = zipfile.ZipInfo(str(path.relative_to(folder)), _FIRST_TIME)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, path.read_bytes())


def _write_safetensors(folder: Path, file: Path) -> None:
    file.write_bytes((folder / "model.safetensors").read_bytes())


def _write_npz(folder: Path, file: Path) -> None:
    import numpy as np
    from safetensors.numpy import load_file

    tensors = load_file(folder / "model.safetensors")
    with file.open("wb") as stream:
        np.savez(stream, allow_pickle=False, **tensors)


def _write_onnx(folder: Path, file: Path, allow_code: bool) -> None:
    from phalanx.exports.onnx_files import load_for_graph, onnx_bytes

    file.write_bytes(onnx_bytes(load_for_graph(folder, allow_code=allow_code)))
