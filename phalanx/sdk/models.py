"""Trained models of a cluster."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from phalanx.errors import AlreadyExists, DataLoss
from phalanx.files import LENGTH_RULE, is_too_long
from phalanx.ids import is_blob_id, is_name, new_request_id
from phalanx.sdk import arguments, methods
from phalanx.sdk.backend import Backend
from phalanx.sdk.discovery import cache_dir
from phalanx.v1 import model_service_pb2
from phalanx.v1.model_service_pb2 import ModelVersion

if TYPE_CHECKING:
    from phalanx.data.predict import LoadedModel

PAGE_SIZE = 500


class Models:
    """``cluster.models``: list, get, download, export and delete models of one namespace."""

    def __init__(self, backend: Backend, namespace: str) -> None:
        self._backend = backend
        self._namespace = namespace

    def list(self) -> list[ModelVersion]:
        """Return all versions of all models."""
        found: list[ModelVersion] = []
        token = ""
        while True:
            request = model_service_pb2.ListModelsRequest(
                namespace=self._namespace, page_size=PAGE_SIZE, page_token=token
            )
            page = self._backend.call(methods.LIST_MODELS, request)
            found += page.models
            token = page.next_page_token
            if not token:
                return found

    def describe(self, name: str) -> ModelVersion:
        """Return what is known of a model, NAME or NAME@VERSION. Raises NotFound."""
        wanted = arguments.text("name", name, arguments.MODEL_NAME)
        request = model_service_pb2.GetModelRequest(namespace=self._namespace, name=wanted)
        return self._backend.call(methods.GET_MODEL, request).model

    def get(self, name: str, *, allow_code: bool = False) -> LoadedModel:
        """Download a model (once; it is kept in the cache folder) and load it.

        ``model.predict(frame)`` takes raw columns and gives original labels. A model that brings
        code of its own runs it in this process, and is loaded only with ``allow_code``. Raises
        NotFound.
        """
        from phalanx.data.model_files import load_model_directory

        return load_model_directory(self.cached(name), allow_code=allow_code)

    def cached(self, name: str) -> Path:
        """Return the folder of a model in the cache, downloading it if it is not there."""
        model = self.describe(name)
        folder = _folder_of(cache_dir() / "models", model)
        if not folder.is_dir():
            self._download(model, folder)
        return folder

    def download(self, name: str, folder: str | PathLike[str]) -> Path:
        """Write the files of a model to a new folder; return it. Raises AlreadyExists."""
        target = arguments.path("folder", folder, "the path of a new folder")
        if target.exists():
            raise AlreadyExists(f"{target} exists; give a folder that does not exist yet")
        self._download(self.describe(name), target)
        return target

    def export(self, name: str, file: str | PathLike[str], *, allow_code: bool = False) -> Path:
        """Write a model to one file that other programs read; return its path.

        ``.zip`` holds all files of the model, ``.safetensors`` and ``.npz`` the parameters only, by
        tensor name. ``.onnx`` takes rows as ``LoadedModel.prepare`` returns them and predicts what
        the model predicts; it needs ``phalanx[onnx]``. That of a PyTorch module runs the module's
        code in this process, for which ``allow_code`` is needed. Raises AlreadyExists, NotFound,
        InvalidArgument for another ending and for a model that becomes no ONNX file, and
        FailedPrecondition where a library is missing.
        """
        from phalanx.sdk.exporting import export_model

        target = arguments.path("file", file, "the path of a new file")
        export_model(self.cached(name), target, allow_code=allow_code)
        return target

    def to_sklearn(self, name: str) -> Any:
        """Return a model as a fitted object of scikit-learn, which needs ``phalanx[learn]``.

        See ``LoadedModel.to_sklearn``; raises NotFound as well.
        """
        from phalanx.exports.estimators import load_convertible

        return load_convertible(self.cached(name)).to_sklearn()

    def delete(self, name: str, *, force: bool = False) -> None:
        """Delete a model, NAME (all versions) or NAME@VERSION.

        Raises FailedPrecondition while a job refers to it that starts from it. With ``force`` only
        while one can still run: those that have ended cannot be verified then. The job that made
        it does not mind.
        """
        request = model_service_pb2.DeleteModelRequest(
            namespace=self._namespace,
            name=arguments.text("name", name, arguments.MODEL_NAME),
            request_id=new_request_id(),
            force=force,
        )
        self._backend.call(methods.DELETE_MODEL, request)

    def _download(self, model: ModelVersion, target: Path) -> None:
        """Fetch all files into a folder beside ``target``, then put it in place at once."""
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            for file in model.files:
                path = temporary / _safe_path(file.path)
                path.parent.mkdir(parents=True, exist_ok=True)
                self._backend.get_blob_to(file.digest, path)
            temporary.chmod(0o755)
            try:
                temporary.rename(target)
            except OSError:
                # Somebody else downloaded the same version in the meantime.
                if not target.is_dir():
                    raise
        finally:
            if temporary.exists():
                shutil.rmtree(temporary, ignore_errors=True)


def _folder_of(root: Path, model: ModelVersion) -> Path:
    """Return where a model is kept; whatever a server says of it, that is below ``root``."""
    for what, text in (("namespace", model.namespace), ("name", model.name)):
        if not is_name(text):
            raise DataLoss(f"the server told of a model whose {what} is {text[:80]!r}")
    sha256 = model.parameters_sha256
    if not is_blob_id(sha256):
        raise DataLoss(f"the server told of a model whose SHA-256 is {sha256[:80]!r}")
    # Keeps models of different clusters apart, also those that differ in what is said of them.
    contents = hashlib.sha256(sha256.encode())
    for file in sorted(model.files, key=lambda each: each.path):
        contents.update(f"\n{file.path} {file.digest}".encode())
    return root / model.namespace / model.name / f"{model.version}-{contents.hexdigest()[:16]}"


def _safe_path(text: str) -> Path:
    """Return a file's path within its model's folder; what leads out of it is refused, and what no
    disk takes."""
    path = PurePosixPath(text)
    if path.is_absolute() or not path.parts or ".." in path.parts or "\0" in text:
        raise DataLoss(f"the model names a file {text[:80]!r}, which lies outside its folder")
    if is_too_long(text):
        raise DataLoss(f"the model names a file {text[:80]!r}…, which is too long; {LENGTH_RULE}")
    return Path(*path.parts)
