"""Every back end that exists, opened empty; the contract suite runs once for each."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from phalanx.testing.object_server import ObjectServer
from phalanx.testing.postgres_server import PostgresServer
from phalanx.testing.storage_messages import digest_of
from phalanx.v1 import dataset_service_pb2 as dataset_pb
from storage.backends.opening import Places, open_backend, open_postgres
from storage.backends.sql.objects import load_blob
from storage.interfaces import Backend, StoredBlob

BACKENDS = ("embedded", "sqlite+s3", "postgres+directory", "postgres+s3")
WITHOUT_BLOBS = ("test_journals", "test_leases")
"""What these are about has nothing to do with where blobs are."""


class EmptyDatabase:
    """A database with all tables and nothing in them, for one test after the other: to make one for
    each of them takes longer than most tests."""

    _NAME = "contract"
    _CLEAR = """
    DO $$
    DECLARE
        used TEXT;
    BEGIN
        -- Whoever is left of a test would have what follows wait.
        PERFORM pg_terminate_backend(pid, 10000) FROM pg_stat_activity
            WHERE datname = current_database() AND pid <> pg_backend_pid();
        SELECT string_agg(relname, ', ') INTO used FROM pg_class
            WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'
            AND relname <> 'schema_version' AND pg_relation_size(oid) > 0;
        IF used <> '' THEN
            EXECUTE 'TRUNCATE ' || used || ' CASCADE';
        END IF;
    END $$
    """

    def __init__(self, server: PostgresServer) -> None:
        self._server = server
        self.url = server.create_database(self._NAME)
        open_postgres(self.url).close()
        rows = self._execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        self._tables = ", ".join(name for (name,) in rows)

    def shrink(self) -> None:
        """Give back the space of rows that are gone."""
        self._execute(f"VACUUM FULL {self._tables}")

    def clear(self) -> None:
        """Have nothing left of a test, not even the space that it took."""
        self._execute(self._CLEAR)

    def _execute(self, statement: str) -> list[tuple[Any, ...]]:
        return self._server.execute(statement, self._NAME)


class Harness:
    """A back end under test and what a test may do to it from outside."""

    def __init__(
        self, folder: Path, postgres: EmptyDatabase | None, objects: ObjectServer | None
    ) -> None:
        self._folder = folder
        self._postgres = postgres
        self._objects = objects
        self._bucket = uuid4().hex
        self._later_s = 0.0
        self.namespace_bytes_max = 0
        """Holds from the next `reopen` on."""
        self.corruptions: list[str] = []
        self.now_unix_nanos = 1_700_000_000_000_000_000
        self.places = Places(
            folder,
            "" if postgres is None else postgres.url,
            "" if objects is None else f"{objects.create_bucket(self._bucket)}/some/where",
        )
        self.backend = self._open()

    def _open(self) -> Backend:
        return open_backend(
            self.places,
            namespace_bytes_max=self.namespace_bytes_max,
            on_corruption=self.corruptions.append,
            now_unix_nanos=lambda: self.now_unix_nanos,
            clock_s=lambda: self._later_s,
        )

    @property
    def database(self):
        """The database of the back end."""
        return self.backend.catalog._database

    def reopen(self) -> None:
        """Close the back end and open it again on the same state."""
        self.backend.close()
        self.backend = self._open()

    def tidy(self) -> None:
        """Do what storage does by itself, once what processes left behind is old."""
        self.backend.keep_time()
        self._later_s += 7 * 24 * 3600.0
        self.backend.references.reclaim()
        self._later_s += 7 * 24 * 3600.0
        self.backend.references.reclaim()
        if self._postgres is not None:
            self._postgres.shrink()

    def flip_bit(self, digest: str, bit: int) -> None:
        """Damage a stored blob."""
        if self._objects is None:
            path = self._folder / "blobs" / digest[:2] / digest
            content = bytearray(path.read_bytes())
        else:
            row = self.database.read(lambda connection: load_blob(connection, digest))
            key = f"some/where/{row.key}"
            content = bytearray(self._objects.get(self._bucket, key))
        content[bit // 8] ^= 1 << (bit % 8)
        if self._objects is None:
            path.write_bytes(content)
        else:
            self._objects.put(self._bucket, key, bytes(content))

    def close(self) -> None:
        """End it."""
        self.backend.close()
        if self._postgres is not None:
            self._postgres.clear()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "harness" in metafunc.fixturenames:
        rows_only = metafunc.module.__name__.rpartition(".")[2] in WITHOUT_BLOBS
        kinds = [kind for kind in BACKENDS if not (rows_only and kind.endswith("s3"))]
        metafunc.parametrize("harness", kinds, indirect=True)


@pytest.fixture(scope="session")
def empty_database(postgres_server: PostgresServer) -> EmptyDatabase:
    """What all tests use whose rows are in PostgreSQL."""
    return EmptyDatabase(postgres_server)


@pytest.fixture
def harness(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Harness]:
    """One back end after the other."""
    kind = request.param
    postgres = request.getfixturevalue("empty_database") if "postgres" in kind else None
    objects = request.getfixturevalue("object_server") if "s3" in kind else None
    harness = Harness(tmp_path / "state", postgres, objects)
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
