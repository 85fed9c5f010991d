"""Data sets of a cluster."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from phalanx.data.link_plans import checking_s
from phalanx.errors import InvalidArgument
from phalanx.ids import new_request_id
from phalanx.sdk import arguments, methods
from phalanx.sdk.backend import Backend
from phalanx.sdk.silence import Silence
from phalanx.v1 import dataset_service_pb2
from phalanx.v1.dataset_service_pb2 import Dataset

if TYPE_CHECKING:
    from concurrent.futures import Future

    from phalanx.data.manifest import DatasetManifest

PAGE_SIZE = 500
_UNDER_WAY_BYTES = 16 * 2**20
"""Of chunks on their way at once: storage takes its time to make each durable."""


class DataSets:
    """``cluster.data``: add, list, get and delete data sets of one namespace."""

    def __init__(self, backend: Backend, namespace: str) -> None:
        self._backend = backend
        self._namespace = namespace

    def add(
        self,
        name: str,
        *source: Any,
        on_stored: Callable[[int], None] | None = None,
        on_silence: Callable[[], None] | None = None,
        **options: Any,
    ) -> Dataset:
        """Write a data set, or a new version of it, into storage.

            cluster.data.add("adult", "adult.csv", target="income", missing="category")
            cluster.data.add("adult", frame, target="income", test=0.2)
            cluster.data.add("fashion", X, y, test=(X_test, y_test))

        ``source`` is one or more paths, or a table with its target column, or features and targets
        (a SciPy sparse matrix stays sparse). ``test`` and ``validation`` are a fraction, files, or
        a pair of features and targets; ``feature_names`` names the columns of an array. ``options``
        are those of ``phalanx.data.options.IngestOptions``. Chunks are stored as they are read, so
        memory stays small whatever the size; ``on_stored`` is told the bytes of each, and
        ``on_silence`` is called once, from another thread, where storage gives no answer for some
        seconds. Raises InvalidArgument with line and column of what is wrong in a file.

        With ``link=True`` Parquet files stay where they are, and storage keeps nothing but a
        manifest; it must be able to read them at the same path, below a folder that it was allowed
        to (``link_roots`` of ``LocalCluster``). Raises FailedPrecondition where it is not.
        """
        # Asked before all is read rather than after.
        arguments.text("name", name, "the name of the data set to add")
        silence = Silence(on_silence)
        with _Sink(self._backend, on_stored, silence) as sink:
            manifest = self._ingest(source, options, sink)
        with silence.watched():
            return self.register(name, manifest)

    def _ingest(
        self, source: tuple[Any, ...], options: dict[str, Any], sink: _Sink
    ) -> DatasetManifest:
        # NumPy and Arrow are loaded only when data is added.
        from phalanx.data.ingest import ingest, ingest_arrays
        from phalanx.data.options import IngestOptions

        if source and all(isinstance(part, str | PathLike) for part in source):
            chosen = IngestOptions.from_mapping(options)
            return ingest([Path(path) for path in source], chosen, sink)
        if not 1 <= len(source) <= 2:
            raise InvalidArgument(
                "data.add takes paths, or a table, or features and targets; "
                f"it was given {len(source)} things of other kinds"
            )
        features, targets = source[0], source[1] if len(source) == 2 else None
        names = options.pop("feature_names", None)
        names = [] if names is None else arguments.texts("feature_names", names, "names of columns")
        held_out = {
            split: options.pop(split)
            for split in ("test", "validation")
            if _is_pair(options.get(split))
        }
        chosen = IngestOptions.from_mapping(options)
        return ingest_arrays(features, targets, chosen, sink, feature_names=names, **held_out)

    def register(self, name: str, manifest: DatasetManifest) -> Dataset:
        """Make a data set of a manifest whose chunks are stored already, or are linked."""
        digest = self._backend.put_blob(manifest.to_json())
        request = dataset_service_pb2.CreateDatasetRequest(
            namespace=self._namespace,
            name=name,
            manifest_digest=digest,
            request_id=new_request_id(),
        )
        more_s = checking_s(manifest)
        return self._backend.call(methods.CREATE_DATASET, request, more_s=more_s).dataset

    def list(self) -> list[Dataset]:
        """Return all data sets."""
        found: list[Dataset] = []
        token = ""
        while True:
            request = dataset_service_pb2.ListDatasetsRequest(
                namespace=self._namespace, page_size=PAGE_SIZE, page_token=token
            )
            page = self._backend.call(methods.LIST_DATASETS, request)
            found += page.datasets
            token = page.next_page_token
            if not token:
                return found

    def get(self, name: str) -> Dataset:
        """Return one data set, NAME or NAME@VERSION. Raises NotFound."""
        wanted = arguments.text("name", name, arguments.DATASET_NAME)
        request = dataset_service_pb2.GetDatasetRequest(namespace=self._namespace, name=wanted)
        return self._backend.call(methods.GET_DATASET, request).dataset

    def manifest(self, name: str) -> DatasetManifest:
        """Return columns, classes, chunks and statistics of a data set. Raises NotFound."""
        from phalanx.data.manifest import DatasetManifest

        return DatasetManifest.from_json(self._backend.get_blob(self.get(name).manifest_digest))

    def delete(self, name: str, *, force: bool = False) -> None:
        """Delete a data set, NAME (all versions) or NAME@VERSION.

        Raises FailedPrecondition while a job refers to it. With ``force`` only while one can still
        run: those that have ended can neither be verified nor be gone on from then.
        """
        request = dataset_service_pb2.DeleteDatasetRequest(
            namespace=self._namespace,
            name=arguments.text("name", name, arguments.DATASET_NAME),
            request_id=new_request_id(),
            force=force,
        )
        self._backend.call(methods.DELETE_DATASET, request)


def _is_pair(value: Any) -> bool:
    """Return whether a split is given as features and targets rather than as a fraction or
    files."""
    if not isinstance(value, tuple) or len(value) != 2:
        return False
    return not any(isinstance(part, str | PathLike) for part in value)


class _Sink:
    """Where ingestion puts its chunks: some are on their way to storage while others are read.

    Leaving the block waits for all of them, or gives up what is under way where it raised.
    """

    def __init__(
        self,
        backend: Backend,
        on_stored: Callable[[int], None] | None,
        silence: Silence,
    ) -> None:
        self._backend = backend
        self._on_stored = on_stored
        self._silence = silence
        self._under_way: deque[tuple[int, Future[str]]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            while kind is None and self._under_way:
                self._settle()
        finally:
            for given_up in self._under_way:
                given_up[1].cancel()

    def put(self, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        under_way_bytes = len(data) + sum(size for size, _ in self._under_way)
        while self._under_way and under_way_bytes > _UNDER_WAY_BYTES:
            under_way_bytes -= self._settle()
        self._under_way.append((len(data), self._backend.start_put_blob(data, digest)))
        return digest

    def _settle(self) -> int:
        """Wait for the oldest; return its bytes."""
        size_bytes, upload = self._under_way[0]
        with self._silence.watched():
            upload.result()
        self._under_way.popleft()
        if self._on_stored is not None:
            self._on_stored(size_bytes)
        return size_bytes
