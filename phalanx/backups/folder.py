"""A folder with backups: snapshots of rows, and the blobs that they name, each blob once.

    format                     version of this layout
    blobs/ab/abcdef…           a blob under its SHA-256
    snapshots/NAME.rows        messages of ReadSnapshot, each after its length in four bytes
    snapshots/NAME.json        the manifest: what belongs to it, with checksums
    partial/                   what is under way

A snapshot is there when its manifest is, which is written last and at once: one that was broken off
has left blobs that the next one need not fetch, and nothing else. No file is ever changed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from google.protobuf.message import DecodeError

from phalanx.errors import DataLoss, FailedPrecondition, NotFound
from phalanx.v1 import storage_service_pb2 as pb

FORMAT = 1
_LENGTH_BYTES = 4
_MESSAGE_LIMIT_BYTES = 64 * 1024 * 1024
_HASH_BYTES = 1024 * 1024


@dataclass(frozen=True)
class Damage:
    """Something that was damaged where it was saved from; ``digest`` is empty for a row."""

    message: str
    digest: str = ""


@dataclass(frozen=True)
class Snapshot:
    """What a manifest says."""

    name: str
    create_unix_nanos: int
    phalanx: str
    rows: int
    rows_bytes: int
    rows_sha256: str
    blobs: int
    blob_bytes: int
    damage: tuple[Damage, ...] = field(default=())

    @property
    def created(self) -> datetime:
        """When it was made."""
        return datetime.fromtimestamp(self.create_unix_nanos / 1e9, UTC)


def new_name(create_unix_nanos: int) -> str:
    """Return a name for a snapshot; names are in the order of time."""
    created = datetime.fromtimestamp(create_unix_nanos / 1e9, UTC)
    return f"{created:%Y%m%dt%H%M%S}{created.microsecond // 1000:03d}-{secrets.token_hex(3)}"


class BackupFolder:
    """A folder with backups, opened; OSError where it cannot be read or written.

    Raises NotFound (BACKUP_NOT_FOUND) if it is none, FailedPrecondition (BACKUP_TOO_NEW) if a newer
    Phalanx made it, and FailedPrecondition (BACKUP_DAMAGED) if it cannot be told what made it.
    """

    def __init__(self, path: Path, *, create: bool = False) -> None:
        self.path = path
        self._snapshots = path / "snapshots"
        self.partial = path / "partial"
        if create:
            self._create()
        try:
            found = json.loads((path / "format").read_bytes())["format"]
        except FileNotFoundError:
            raise NotFound(f"{path} holds no backups", reason="BACKUP_NOT_FOUND") from None
        except (ValueError, KeyError, TypeError):
            raise damaged(f"{path / 'format'} is damaged") from None
        if not isinstance(found, int) or found > FORMAT:
            raise FailedPrecondition(
                f"the backups in {path} were made by a newer Phalanx (format {found}; this one "
                f"knows {FORMAT}): use that version",
                reason="BACKUP_TOO_NEW",
            )

    def _create(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not (self.path / "format").exists():
            if any(entry.name != "lock" for entry in self.path.iterdir()):
                raise FailedPrecondition(
                    f"{self.path} is not empty and holds no backups: name a folder of its own",
                    reason="BACKUP_ELSEWHERE",
                )
            self._write(self.path / "format", json.dumps({"format": FORMAT}).encode() + b"\n")

    @contextmanager
    def locked(self, *, alone: bool) -> Iterator[None]:
        """Keep those out who would change it; with ``alone`` those who read it, too.

        Raises FailedPrecondition (BACKUP_IN_USE).
        """
        flags = os.O_RDWR | os.O_CREAT if alone else os.O_RDONLY
        try:
            lock = os.open(self.path / "lock", flags, 0o600)
        except FileNotFoundError:
            yield  # nobody has ever changed this copy
            return
        try:
            try:
                fcntl.flock(lock, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            except BlockingIOError:
                raise FailedPrecondition(
                    f"another process uses the backups in {self.path}; try again when it has ended",
                    reason="BACKUP_IN_USE",
                ) from None
            if alone:
                self._tidy()
            yield
        finally:
            os.close(lock)

    def _tidy(self) -> None:
        """Remove what was broken off, except for blobs, which the next backup has use for."""
        shutil.rmtree(self.partial, ignore_errors=True)
        for folder in (self.partial, self._snapshots, self.path / "blobs"):
            folder.mkdir(exist_ok=True, mode=0o700)
        names = set(self.names())
        for path in self._snapshots.iterdir():
            if path.stem not in names:
                path.unlink()

    # Snapshots

    def names(self) -> list[str]:
        """Return the names of the snapshots, oldest first."""
        return sorted(path.stem for path in self._snapshots.glob("*.json"))

    def load(self, name: str = "") -> Snapshot:
        """Return a snapshot, the newest one by default; NotFound, or BACKUP_DAMAGED."""
        names = self.names()
        if not names or (name and name not in names):
            what = f"no snapshot {name!r}; `phalanx backup --list` shows them" if name else "none"
            raise NotFound(f"of the snapshots in {self.path} there is {what}")
        path = self._snapshots / f"{name or names[-1]}.json"
        try:
            found: dict[str, Any] = json.loads(path.read_bytes())
            checksum = found.pop("sha256")
            damage = tuple(Damage(**each) for each in found.pop("damage"))
            snapshot = Snapshot(**found, damage=damage)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise damaged(f"the manifest {path} is damaged") from None
        if checksum != _manifest_sha256(snapshot) or snapshot.name != path.stem:
            raise damaged(f"the manifest {path} does not match its checksum")
        return snapshot

    def add(self, snapshot: Snapshot, rows: Path) -> None:
        """Make a snapshot be there, whose blobs are; ``rows`` becomes part of it."""
        rows.replace(self.rows_path(snapshot.name))
        content = {**asdict(snapshot), "sha256": _manifest_sha256(snapshot)}
        for folder in (self.path / "blobs").iterdir():
            _sync_folder(folder)
        _sync_folder(self.path / "blobs")
        _sync_folder(self._snapshots)
        path = self._snapshots / f"{snapshot.name}.json"
        self._write(path, json.dumps(content, indent=1).encode() + b"\n")

    def remove(self, name: str) -> None:
        """Remove a snapshot; its blobs stay until ``sweep``."""
        (self._snapshots / f"{name}.json").unlink()
        _sync_folder(self._snapshots)
        with suppress(FileNotFoundError):
            self.rows_path(name).unlink()

    def sweep(self) -> tuple[int, int]:
        """Remove the blobs that no snapshot names; return how many, and their bytes.

        Raises FailedPrecondition (BACKUP_DAMAGED) if one cannot be read: it might name them.
        """
        named: set[bytes] = set()
        for name in self.names():
            self.check_rows(self.load(name))
            named.update(bytes.fromhex(blob.digest) for blob in self.blobs(name))
        count = freed_bytes = 0
        for path in (self.path / "blobs").glob("*/*"):
            if bytes.fromhex(path.name) not in named:
                freed_bytes += path.stat().st_size
                count += 1
                path.unlink()
        return count, freed_bytes

    def rows_path(self, name: str) -> Path:
        """Return where the rows of a snapshot are."""
        return self._snapshots / f"{name}.rows"

    def messages(self, name: str) -> Iterator[pb.ReadSnapshotResponse]:
        """Yield what a snapshot says; FailedPrecondition (BACKUP_DAMAGED)."""
        path = self.rows_path(name)
        try:
            with path.open("rb") as file:
                yield from read_messages(file)
        except (FileNotFoundError, DataLoss) as error:
            raise damaged(f"{path} is damaged: {error}") from None

    def blobs(self, name: str) -> Iterator[pb.NamedBlob]:
        """Yield the blobs that a snapshot names, whether they could be saved or not."""
        for message in self.messages(name):
            yield from message.blobs

    def check_rows(self, snapshot: Snapshot) -> None:
        """Raise FailedPrecondition (BACKUP_DAMAGED) unless the rows are those that were saved."""
        found = sha256_of(self.rows_path(snapshot.name))
        if found != snapshot.rows_sha256:
            what = "are missing" if found is None else "do not match their checksum"
            raise damaged(f"the rows of snapshot {snapshot.name} {what}")

    # Blobs

    def blob_path(self, digest: str) -> Path:
        """Return where a blob is."""
        return self.path / "blobs" / digest[:2] / digest

    def holds(self, digest: str) -> bool:
        """Read a blob; say whether it is there and what it was."""
        return sha256_of(self.blob_path(digest)) == digest

    def put(self, partial: Path, digest: str) -> None:
        """Make a verified file a blob, durably once ``add`` has ended."""
        path = self.blob_path(digest)
        path.parent.mkdir(exist_ok=True, mode=0o700)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)

    def _write(self, path: Path, content: bytes) -> None:
        partial = path.with_name(f".{path.name}.partial")
        try:
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        _sync_folder(path.parent)


def write_message(file: BinaryIO, message: pb.ReadSnapshotResponse) -> None:
    """Write a message behind those before it."""
    content = message.SerializeToString()
    file.write(len(content).to_bytes(_LENGTH_BYTES, "little") + content)


def read_messages(file: BinaryIO) -> Iterator[pb.ReadSnapshotResponse]:
    """Yield all messages of a file; DataLoss if it is none."""
    while head := file.read(_LENGTH_BYTES):
        length = int.from_bytes(head, "little")
        if len(head) < _LENGTH_BYTES or length > _MESSAGE_LIMIT_BYTES:
            raise DataLoss("it has a frame that cannot be")
        content = file.read(length)
        if len(content) < length:
            raise DataLoss("it ends in the midst of a frame")
        try:
            yield pb.ReadSnapshotResponse.FromString(content)
        except DecodeError:
            raise DataLoss("a frame is no message") from None


def sha256_of(path: Path) -> str | None:
    """Return the SHA-256 of a file; None if it is not there."""
    checksum = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_HASH_BYTES):
                checksum.update(chunk)
    except FileNotFoundError:
        return None
    return checksum.hexdigest()


def damaged(what: str) -> FailedPrecondition:
    """Return the error for a backup that is not what was written."""
    return FailedPrecondition(f"{what}; use another snapshot", reason="BACKUP_DAMAGED")


def _manifest_sha256(snapshot: Snapshot) -> str:
    text = json.dumps(asdict(snapshot), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
