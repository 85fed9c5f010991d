"""What the storage of tests keeps things in: a state folder, or PostgreSQL and an object store.

    with stores.used(SharedStores(postgres, objects)):      # without it: state folders
        kept = stores.kept(tmp_path / "state")
        with StorageProcess(tmp_path / "state", environment=kept.environment) as storage:
            ...
            kept.damage(digest)

Every storage has a database and a bucket of its own; the servers are shared. One that starts again
with the same state folder has the same ones again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol
from uuid import uuid4

from phalanx.testing.object_server import ObjectServer
from phalanx.testing.postgres_server import PostgresServer

EMBEDDED, POSTGRES_S3 = CHOICES = ("embedded", "postgres+s3")
_PREFIX = "cluster"


class Kept(Protocol):
    """What one storage keeps, seen from outside."""

    environment: Mapping[str, str]
    """What its process needs in order to keep it there."""

    def blobs(self) -> dict[str, bytes]:
        """Return all blobs by their digests."""

    def damage(self, digest: str) -> None:
        """Change one bit of a blob."""

    def unfinished(self) -> bool:
        """Whether there is anything of an upload that was neither completed nor given up."""

    def shut(self) -> contextlib.AbstractContextManager[None]:
        """Let no storage process start on it meanwhile; the one that runs must be ended inside."""


class EmbeddedKept:
    """A state folder."""

    def __init__(self, folder: Path) -> None:
        self.environment: Mapping[str, str] = {}
        self._folder = folder

    def blobs(self) -> dict[str, bytes]:
        """Return all blobs by their digests."""
        return {path.name: path.read_bytes() for path in (self._folder / "blobs").glob("*/*")}

    def damage(self, digest: str) -> None:
        """Change one bit of a blob."""
        path = self._folder / "blobs" / digest[:2] / digest
        path.write_bytes(_damaged(path.read_bytes()))

    def unfinished(self) -> bool:
        """Whether there are files of uploads."""
        return any((self._folder / "uploads").iterdir())

    @contextlib.contextmanager
    def shut(self) -> Iterator[None]:
        """Put a file where the folder was."""
        aside = self._folder.with_name(self._folder.name + "-aside")
        self._folder.rename(aside)
        self._folder.touch()
        try:
            yield
        finally:
            self._folder.unlink()
            aside.rename(self._folder)


class SharedKept:
    """A database and a bucket."""

    def __init__(self, postgres: PostgresServer, objects: ObjectServer) -> None:
        self.name = f"kept-{uuid4().hex}"
        self._postgres = postgres
        self._objects = objects
        self.environment: Mapping[str, str] = {
            **objects.environment,
            "PHALANX_STORAGE_METADATA": postgres.create_database(self.name),
            "PHALANX_STORAGE_BLOBS": f"{objects.create_bucket(self.name)}/{_PREFIX}",
        }

    def blobs(self) -> dict[str, bytes]:
        """Return all blobs by their digests."""
        return {digest: self._objects.get(self.name, key) for digest, key in self._keys().items()}

    def damage(self, digest: str) -> None:
        """Change one bit of a blob."""
        key = self._keys()[digest]
        self._objects.put(self.name, key, _damaged(self._objects.get(self.name, key)))

    def unfinished(self) -> bool:
        """Never to be asked for: what a killed process leaves is swept up when it is old."""
        return False

    @contextlib.contextmanager
    def shut(self) -> Iterator[None]:
        """Have the database take nobody in."""
        self._allow_connections(False)
        try:
            yield
        finally:
            self._allow_connections(True)

    def _keys(self) -> dict[str, str]:
        """The keys of the objects that hold blobs, by digest: the database knows them."""
        rows = self._postgres.execute(
            "SELECT digest, key FROM objects WHERE state = 'stored'", self.name
        )
        return {digest: f"{_PREFIX}/{key}" for digest, key in rows}

    def _allow_connections(self, allow: bool) -> None:
        self._postgres.execute(f'ALTER DATABASE "{self.name}" ALLOW_CONNECTIONS {allow}')


class SharedStores:
    """One PostgreSQL server and one S3 server for many storages."""

    def __init__(self, postgres: PostgresServer, objects: ObjectServer) -> None:
        self._postgres = postgres
        self._objects = objects
        self._kept: dict[Path, SharedKept] = {}

    def kept(self, state: Path | None) -> SharedKept:
        """Return what a storage with this state folder keeps; without one, something new."""
        if state is None:
            return SharedKept(self._postgres, self._objects)
        if state not in self._kept:
            self._kept[state] = SharedKept(self._postgres, self._objects)
        return self._kept[state]


_used: SharedStores | None = None


@contextlib.contextmanager
def used(shared: SharedStores | None) -> Iterator[None]:
    """Let storages of tests be on these servers for as long as the block runs; None: embedded."""
    global _used  # noqa: PLW0603 - clusters of tests are begun in many places
    before, _used = _used, shared
    try:
        yield
    finally:
        _used = before


def shared_kept(state: Path | None = None) -> SharedKept | None:
    """Return what a storage that begins now keeps on shared servers; None: it is embedded."""
    return None if _used is None else _used.kept(state)


def kept(state: Path) -> Kept:
    """Return what a storage with this state folder keeps."""
    return shared_kept(state) or EmbeddedKept(state)


def _damaged(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 0b100])
