"""Data sets and models."""

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

from google.protobuf import empty_pb2
from google.protobuf.message import DecodeError

from phalanx import deletions
from phalanx.errors import DataLoss, FailedPrecondition, NotFound, Unavailable
from phalanx.texts import number_of
from phalanx.v1 import dataset_service_pb2 as dataset_pb
from phalanx.v1 import model_service_pb2 as model_pb
from phalanx.v1 import storage_service_pb2 as pb
from storage.backends.sql.connection import Connection, Database
from storage.backends.sql.leases import check_request_fence
from storage.backends.sql.links import SqlLinks, Unnamed, make_room, rows_linking
from storage.backends.sql.references import PIN, add_references, drop_references
from storage.backends.sql.requests import once
from storage.backends.sql.rows import NAMES, PINS, REFERENCES, next_id
from storage.core import catalog
from storage.core.catalog import Page, VersionName
from storage.core.keys import check_digest, check_key, check_word, invalid
from storage.interfaces import BlobStore, BytesQuota

DATASET = "dataset"
MODEL = "model"
_NEXT_HOLDERS = """
SELECT holder FROM (
    SELECT DISTINCT holder FROM pins WHERE holder > ? AND ended = 0 ORDER BY holder LIMIT ?
) AS of_versions
UNION SELECT owner FROM (
    SELECT DISTINCT owner FROM blob_references WHERE kind = ? AND owner > ? ORDER BY owner LIMIT ?
) AS of_blobs ORDER BY 1 LIMIT ?
"""

EntryT = TypeVar("EntryT", dataset_pb.Dataset, model_pb.ModelVersion)


class SqlCatalog:
    """A Catalog. ``now_unix_nanos`` reads the wall clock.

    ``namespace_bytes_max`` limits the data sets and models of one namespace, of all alike or as it
    says of each; 0 for no limit.
    """

    def __init__(
        self,
        database: Database,
        blobs: BlobStore,
        now_unix_nanos: Callable[[], int],
        namespace_bytes_max: BytesQuota = 0,
        links: SqlLinks | None = None,
    ) -> None:
        self._namespace_bytes_max = namespace_bytes_max
        self._database = database
        self._links = links or SqlLinks(database)
        self._blobs = blobs
        self._now_unix_nanos = now_unix_nanos

    def create_dataset(
        self,
        request: dataset_pb.CreateDatasetRequest,
        summary: dataset_pb.Dataset,
        digests: Iterable[str],
        linked: Iterable[str] = (),
    ) -> dataset_pb.Dataset:
        """Register the next version of a data set."""
        name = catalog.new_name(request.namespace, request.name)
        chunks = sorted({check_digest(digest, "linked") for digest in linked})
        wanted = sorted({*digests, check_digest(request.manifest_digest, "manifest_digest")})
        row = None
        if chunks and not self._is_newest(name, request.manifest_digest):
            row = self._links.write(chunks)

        def create(connection: Connection) -> dataset_pb.Dataset:
            newest = _newest(connection, DATASET, name)
            if newest is not None:
                dataset = _load(connection, DATASET, newest, dataset_pb.Dataset)
                if dataset.manifest_digest == request.manifest_digest:
                    return dataset
            if chunks and row is None:
                raise Unavailable(f"another version of {name} came meanwhile; try again")
            self._check_stored(wanted)
            dataset = dataset_pb.Dataset()
            dataset.CopyFrom(summary)
            self._check_quota(connection, name.namespace, catalog.dataset_bytes(dataset))
            self._insert(connection, DATASET, name, dataset, wanted, row)
            return dataset

        act = once(request, request.request_id, dataset_pb.Dataset, create, self._now_s)
        try:
            created = self._database.write(act)
        except BaseException:
            if row is not None:
                self._links.give_up(row)
            raise
        if row is not None and self._links.is_unnamed(row):
            self._links.drop(row)  # the answer was there already
        return created

    def datasets_linking(self, digest: str) -> list[dataset_pb.Dataset]:
        """Return the data sets whose manifest says how to make a chunk, newest first."""
        check_digest(digest, "digest")

        def read(connection: Connection) -> list[dataset_pb.Dataset]:
            found = (_dataset_of(connection, each) for each in rows_linking(connection, digest))
            return [dataset for dataset in found if dataset is not None]

        return self._database.read(read)

    def create_model(self, request: model_pb.CreateModelRequest) -> model_pb.ModelVersion:
        """Register the next version of a model."""
        name = catalog.check_model(request.model)
        sizes_given = {file.digest: file.size_bytes for file in request.model.files}

        def create(connection: Connection) -> model_pb.ModelVersion:
            sizes = self._check_stored(sizes_given)
            model = model_pb.ModelVersion()
            model.CopyFrom(request.model)
            for file in model.files:
                file.size_bytes = sizes[file.digest]
            self._check_quota(connection, name.namespace, catalog.model_bytes(model))
            self._insert(connection, MODEL, name, model, sizes_given)
            return model

        return self._database.write(
            once(request, request.request_id, model_pb.ModelVersion, create, self._now_s)
        )

    def get_dataset(self, name: VersionName) -> dataset_pb.Dataset:
        """Return one version of a data set."""
        return self._get(DATASET, name, dataset_pb.Dataset)

    def get_model(self, name: VersionName) -> model_pb.ModelVersion:
        """Return one version of a model."""
        return self._get(MODEL, name, model_pb.ModelVersion)

    def list_datasets(self, page: Page) -> tuple[list[dataset_pb.Dataset], str]:
        """Return one page of data sets."""
        return self._list(DATASET, page, dataset_pb.Dataset)

    def list_models(self, page: Page) -> tuple[list[model_pb.ModelVersion], str]:
        """Return one page of models."""
        return self._list(MODEL, page, model_pb.ModelVersion)

    def delete_dataset(self, request: dataset_pb.DeleteDatasetRequest, name: VersionName) -> None:
        """Delete a data set or one version of it."""
        self._delete(DATASET, name, request, request.request_id)

    def delete_model(self, request: model_pb.DeleteModelRequest, name: VersionName) -> None:
        """Delete a model or one version of it."""
        self._delete(MODEL, name, request, request.request_id)

    def set_pins(self, request: pb.SetPinsRequest) -> None:
        """Replace the pins of a holder, or note that it has ended."""
        holder = check_word(request.holder, "holder")
        if request.ended:
            self._end_holder(request, holder)
            return
        versions: list[tuple[str, VersionName]] = []
        blobs: list[str] = []
        for index, pin in enumerate(request.pins):
            field = f"pins[{index}]"
            if pin.HasField("blob"):
                blobs.append(check_digest(pin.blob, f"{field}.blob"))
            elif pin.HasField("dataset"):
                versions.append((DATASET, _pinned(pin.dataset, f"{field}.dataset")))
            elif pin.HasField("model"):
                versions.append((MODEL, _pinned(pin.model, f"{field}.model")))
            else:
                raise invalid(field, "names nothing; give a dataset, a model or a blob")

        def act(connection: Connection) -> None:
            check_request_fence(connection, request)
            missing = set(blobs) - set(self._blobs.sizes(blobs))
            if missing:
                raise NotFound(f"blob {min(missing)} is not stored", reason="BLOB_NOT_FOUND")
            connection.execute("DELETE FROM pins WHERE holder = ?", (holder,))
            drop_references(connection, PIN, holder)
            for kind, name in versions:
                if _row_id(connection, kind, name) is None:
                    raise _not_found(kind, name)
                pin_row = PINS.sealed(kind, name.namespace, name.name, name.version, holder, 0)
                connection.execute(PINS.insertion_if_new, pin_row)
            add_references(connection, PIN, holder, 0, blobs)

        self._database.write(act)

    def _end_holder(self, request: pb.SetPinsRequest, holder: str) -> None:
        if request.pins:
            raise invalid("pins", "a holder that has ended keeps those that it has; give none")

        def act(connection: Connection) -> None:
            check_request_fence(connection, request)
            for row in list(PINS.select(connection, "holder = ?", holder)):
                connection.execute(PINS.replacement, PINS.sealed(*row[:-1], 1))
            drop_references(connection, PIN, holder)

        self._database.write(act)

    def pin_holders(self, after: str, limit: int) -> list[str]:
        """Return who holds pins and has not ended."""

        def read(connection: Connection) -> list[str]:
            names = connection.execute(_NEXT_HOLDERS, (after, limit, PIN, after, limit, limit))
            page = [name for (name,) in names]
            if not page:
                return []
            # A damaged name would be taken for that of nobody, and its pins let go.
            span = (after, page[-1])
            where = "holder > ? AND holder <= ? AND ended = 0"
            found = {row[4] for row in PINS.select(connection, where, *span)}
            owned = REFERENCES.select(
                connection, "kind = ? AND owner > ? AND owner <= ?", PIN, *span
            )
            return sorted(found | {row[2] for row in owned})

        return self._database.read(read)

    def _now_s(self) -> float:
        return self._now_unix_nanos() / 1e9

    def _is_newest(self, name: VersionName, manifest_digest: str) -> bool:
        def read(connection: Connection) -> bool:
            newest = _newest(connection, DATASET, name)
            if newest is None:
                return False
            dataset = _load(connection, DATASET, newest, dataset_pb.Dataset)
            return dataset.manifest_digest == manifest_digest

        return self._database.read(read)

    def _check_quota(self, connection: Connection, namespace: str, more: int) -> None:
        """Raise ResourceExhausted where a namespace would hold more than it may."""
        quota = self._namespace_bytes_max
        limit = quota(namespace) if callable(quota) else quota
        if not limit:
            return
        used = sum(
            catalog.dataset_bytes(entry)
            for entry in _all(connection, DATASET, namespace, dataset_pb.Dataset)
        ) + sum(
            catalog.model_bytes(entry)
            for entry in _all(connection, MODEL, namespace, model_pb.ModelVersion)
        )
        catalog.check_quota(namespace, limit, used, more)

    def _check_stored(self, digests: Iterable[str]) -> Mapping[str, int]:
        wanted = sorted(digests)
        sizes = self._blobs.sizes(wanted)
        missing = [digest for digest in wanted if digest not in sizes]
        if missing:
            raise FailedPrecondition(
                f"{len(missing)} of {number_of(len(wanted), 'blob')} not stored, as {missing[0]}; "
                "put what is missing first",
                reason="BLOB_MISSING",
                details={"digest": missing[0]},
            )
        return sizes

    def _insert(
        self,
        connection: Connection,
        kind: str,
        name: VersionName,
        entry: dataset_pb.Dataset | model_pb.ModelVersion,
        digests: Iterable[str],
        linking: Unnamed | None = None,
    ) -> None:
        """Give ``entry`` the next version of ``name`` and store it, in the row that has its links
        if there is one."""
        entry.namespace, entry.name = name.namespace, name.name
        entry.version = _take_version(connection, kind, name)
        entry.create_time.FromNanoseconds(self._now_unix_nanos())
        message = entry.SerializeToString(deterministic=True)
        row = (kind, name.namespace, name.name, entry.version)
        if linking is None:
            row_id = next_id(connection, "versions")
        else:
            row_id = linking.id
            make_room(connection, linking)
        connection.execute(
            "INSERT INTO versions (id, kind, namespace, name, version, checksum, message) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            (row_id, *row, version_checksum(kind, entry.version, message), message),
        )
        add_references(connection, kind, "", row_id, digests)

    def _get(self, kind: str, name: VersionName, entry_class: type[EntryT]) -> EntryT:
        def act(connection: Connection) -> EntryT:
            exact = name if name.version else _newest(connection, kind, name)
            if exact is None:
                raise _not_found(kind, name)
            return _load(connection, kind, exact, entry_class)

        return self._database.read(act)

    def _list(self, kind: str, page: Page, entry_class: type[EntryT]) -> tuple[list[EntryT], str]:
        after_name, after_version = page.after or ("", 0)

        def act(connection: Connection) -> list[tuple[str, int, int, bytes]]:
            return connection.execute(
                "SELECT name, version, checksum, message FROM versions "
                "WHERE kind = ? AND namespace = ? AND (name > ? OR (name = ? AND version < ?)) "
                "ORDER BY name, version DESC LIMIT ?",
                (kind, page.namespace, after_name, after_name, after_version, page.size + 1),
            ).fetchall()

        rows, token = catalog.split_page(
            page, self._database.read(act), lambda row: (row[0], row[1])
        )
        entries = []
        for row_name, version, checksum, message in rows:
            exact = VersionName(page.namespace, row_name, version)
            entries.append(_parse(kind, exact, checksum, message, entry_class))
        return entries, token

    def _delete(
        self,
        kind: str,
        name: VersionName,
        request: dataset_pb.DeleteDatasetRequest | model_pb.DeleteModelRequest,
        request_id: str,
    ) -> None:
        nameless: list[Unnamed] = []

        def delete(connection: Connection) -> empty_pb2.Empty:
            nameless.clear()
            values = (kind, name.namespace, name.name, name.version, name.version)
            where = "kind = ? AND namespace = ? AND name = ? AND (? = 0 OR version = ?)"
            # All of it are constants of this program.
            rows = connection.execute(f"SELECT id FROM versions WHERE {where}", values)  # noqa: S608
            row_ids = [row_id for (row_id,) in rows]
            if not row_ids:
                raise _not_found(kind, name)
            pins = [(row[4], bool(row[5])) for row in PINS.select(connection, where, *values)]
            deletions.check_unused(_WORDS[kind], str(name), pins, force=request.force)
            for row_id in row_ids:
                row = self._links.give_up_name(connection, row_id)
                if row is not None:
                    nameless.append(row)
                else:
                    connection.execute("DELETE FROM versions WHERE id = ?", (row_id,))
                drop_references(connection, kind, "", row_id)
            return empty_pb2.Empty()

        self._database.write(once(request, request_id, empty_pb2.Empty, delete, self._now_s))
        for row in nameless:
            self._links.drop(row)


_WORDS = {DATASET: deletions.DATASET, MODEL: deletions.MODEL}


def _newest(connection: Connection, kind: str, name: VersionName) -> VersionName | None:
    row = connection.execute(
        "SELECT max(version) FROM versions WHERE kind = ? AND namespace = ? AND name = ?",
        (kind, name.namespace, name.name),
    ).fetchone()
    return None if row[0] is None else VersionName(name.namespace, name.name, row[0])


def _row_id(connection: Connection, kind: str, name: VersionName) -> int | None:
    row = connection.execute(
        "SELECT id FROM versions WHERE kind = ? AND namespace = ? AND name = ? AND version = ?",
        (kind, name.namespace, name.name, name.version),
    ).fetchone()
    return None if row is None else int(row[0])


def _dataset_of(connection: Connection, row_id: int) -> dataset_pb.Dataset | None:
    """Return the data set of a row; None for one that has no name yet, or none any more."""
    row = connection.execute(
        "SELECT namespace, name, version, checksum, message FROM versions "
        "WHERE id = ? AND kind = ?",
        (row_id, DATASET),
    ).fetchone()
    if row is None:
        return None
    namespace, name, version, checksum, message = row
    exact = VersionName(namespace, name, version)
    return _parse(DATASET, exact, checksum, message, dataset_pb.Dataset)


def _load(
    connection: Connection, kind: str, name: VersionName, entry_class: type[EntryT]
) -> EntryT:
    row = connection.execute(
        "SELECT checksum, message FROM versions "
        "WHERE kind = ? AND namespace = ? AND name = ? AND version = ?",
        (kind, name.namespace, name.name, name.version),
    ).fetchone()
    if row is None:
        raise _not_found(kind, name)
    return _parse(kind, name, row[0], row[1], entry_class)


def _all(
    connection: Connection, kind: str, namespace: str, entry_class: type[EntryT]
) -> Iterator[EntryT]:
    rows = connection.execute(
        "SELECT name, version, checksum, message FROM versions WHERE kind = ? AND namespace = ?",
        (kind, namespace),
    )
    for name, version, checksum, message in rows:
        yield _parse(kind, VersionName(namespace, name, version), checksum, message, entry_class)


def _parse(
    kind: str, name: VersionName, checksum: int, message: bytes, entry_class: type[EntryT]
) -> EntryT:
    if version_checksum(kind, name.version, message) == checksum:
        try:
            entry = entry_class.FromString(message)
        except DecodeError:
            pass
        else:
            if (entry.namespace, entry.name, entry.version) == (
                name.namespace,
                name.name,
                name.version,
            ):
                return entry
    raise DataLoss(
        f"the entry of {_WORDS[kind]} {name} does not match its checksum; restore storage from a "
        "backup",
        reason="CATALOG_CORRUPT",
    )


def _take_version(connection: Connection, kind: str, name: VersionName) -> int:
    row = NAMES.find(connection, kind, name.namespace, name.name)
    version = 1 if row is None else int(row[3])
    row = NAMES.sealed(kind, name.namespace, name.name, version + 1)
    connection.execute(NAMES.replacement, row)
    return version


def version_checksum(kind: str, version: int, message: bytes) -> int:
    """Return the checksum of the row of a data set or a model."""
    return zlib.crc32(message, zlib.crc32(f"{kind}\0{version}".encode()))


def _pinned(version: pb.PinnedVersion, field: str) -> VersionName:
    if version.version < 1:
        raise invalid(f"{field}.version", "a pin names a version of 1 or more")
    namespace = catalog.namespace_of(version.namespace)
    return VersionName(namespace, check_key(version.name, f"{field}.name"), version.version)


def _not_found(kind: str, name: VersionName) -> NotFound:
    return NotFound(
        f"there is no {_WORDS[kind]} {name}; list them to see the names and versions that exist",
        reason=f"{kind.upper()}_NOT_FOUND",
    )
