"""Every back end that exists, opened empty; the contract suite runs once for each."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import pytest

from phalanx.testing.storage_messages import digest_of
from phalanx.v1 import dataset_service_pb2 as dataset_pb
from storage.backends.sqlite import open_embedded_backend
from storage.interfaces import Backend, StoredBlob


class Harness(Protocol):
    """A back end under test and what a test may do to it from outside."""

    backend: Backend
    corruptions: list[str]
    now_unix_nanos: int
    namespace_bytes_max: int
    """Holds from the next `reopen` on."""

    def reopen(self) -> None:
        """Close the back end and open it again on the same state."""

    def flip_bit(self, digest: str, bit: int) -> None:
        """Damage a stored blob."""

    def close(self) -> None:
        """End it."""


class EmbeddedHarness:
    """SQLite and a directory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.namespace_bytes_max = 0
        self.corruptions: list[str] = []
        self.now_unix_nanos = 1_700_000_000_000_000_000
        self.backend = self._open()

    def _open(self) -> Backend:
        return open_embedded_backend(
            self._folder,
            namespace_bytes_max=self.namespace_bytes_max,
            on_corruption=self.corruptions.append,
            now_unix_nanos=lambda: self.now_unix_nanos,
        )

    def reopen(self) -> None:
        self.backend.close()
        self.backend = self._open()

    def flip_bit(self, digest: str, bit: int) -> None:
        path = self._folder / "blobs" / digest[:2] / digest
        content = bytearray(path.read_bytes())
        content[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(content)

    def close(self) -> None:
        self.backend.close()


HARNESSES: dict[str, Callable[[Path], Harness]] = {"embedded": EmbeddedHarness}


@pytest.fixture(params=HARNESSES)
def harness(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Harness]:
    """One back end after the other."""
    harness = HARNESSES[request.param](tmp_path / "state")
    yield harness
    harness.close()


@pytest.fixture
def backend(harness: Harness) -> Backend:
    """The back end of the harness, for tests that do not reopen it."""
    return harness.backend


@pytest.fixture
def put(harness: Harness) -> Callable[[bytes], str]:
    """Stores a blob and returns its digest."""

    def put_blob(content: bytes) -> str:
        writer = harness.backend.blobs.writer()
        writer.write(content)
        stored = writer.commit()
        assert stored == StoredBlob(digest_of(content), len(content))
        return stored.digest

    return put_blob


@pytest.fixture
def add(harness: Harness, put: Callable[[bytes], str]) -> Callable[..., dataset_pb.Dataset]:
    """Registers a data set of one chunk; the manifest differs with ``content``."""

    def create(
        name: str = "adult", content: bytes = b"chunk", request_id: str = "", namespace: str = ""
    ) -> dataset_pb.Dataset:
        chunk, manifest = put(content), put(b"manifest of " + content)
        request = dataset_pb.CreateDatasetRequest(
            namespace=namespace, name=name, manifest_digest=manifest, request_id=request_id
        )
        summary = dataset_pb.Dataset(
            manifest_digest=manifest, rows={"train": 10}, features=3, task="classification"
        )
        return harness.backend.catalog.create_dataset(request, summary, [chunk])

    return create
