"""Blobs of storage on the worker's disk: named by digest, least recently used go first.

Several workers of one machine may share the folder. A file appears whole (temporary file, then
rename) and is named by the SHA-256 of its content, so whoever finds it may use it. Who uses one
holds a shared lock on it; who makes room takes an exclusive one first, and the kernel drops the
locks of the dead. A file that is removed all the same stays readable for those that mapped it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import os
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from phalanx.errors import DataLoss, InvalidArgument, ResourceExhausted
from phalanx.ids import check_blob_id
from phalanx.telemetry.logs import get_logger
from phalanx.telemetry.metrics import WorkerMetrics
from phalanx.texts import number_of
from worker.turns import Turns

Download = Callable[[str, Path], Awaitable[None]]
"""(digest, path): makes a file of the blob, which appears whole, after its content was compared
with the digest, or not at all; until then it is beside it as `.DIGEST.*.part`. Raises
PhalanxError."""

_PARALLEL_DOWNLOADS = 4
_PREFETCHES_MAX = 256
_LATER_S = 60.0
_ARRIVALS_MAX = 3
"""Downloads of one blob for one request: it may be removed by another worker before it is used."""
_ABANDONED_S = 3600.0
_PROVEN_MAX = 100_000

_log = get_logger(__name__)


@dataclass
class _Pin:
    """A lock on a cached file, and how many users it has."""

    fd: int
    users: int = 0


@dataclass(eq=False)
class Pinned:
    """A cached file that is kept until `release`."""

    path: Path
    digest: str
    _cache: BlobCache | None = field(repr=False, default=None)

    def release(self) -> None:
        """The file may go when room is needed; harmless when called twice."""
        cache, self._cache = self._cache, None
        if cache is not None:
            cache.unpin(self.digest)


class BlobCache:
    """A folder with a byte limit. One instance per process; use it in one event loop.

    Pinned files are never removed, so the folder may exceed the limit by what is in use; and for a
    while by a part of the limit for each other worker that fetches into it.
    """

    def __init__(
        self, folder: Path, limit_bytes: int, download: Download, metrics: WorkerMetrics
    ) -> None:
        self.limit_bytes = limit_bytes
        self._blobs = folder / "blobs"
        self._blobs.mkdir(parents=True, exist_ok=True)
        self._download = download
        self._metrics = metrics
        self._pins: dict[str, _Pin] = {}
        #: Files whose content this process has seen to be what they are named by: their inodes.
        self._proven: OrderedDict[str, int] = OrderedDict()
        self._arriving: dict[str, asyncio.Task[None]] = {}
        self._prefetching: set[asyncio.Task[None]] = set()
        self._reading_ahead: set[asyncio.Task[None]] = set()
        #: What was fetched for later and that nobody has used yet: when, and sizes.
        self._later: dict[str, tuple[float, int]] = {}
        self._turns = Turns(_PARALLEL_DOWNLOADS)
        self._remove_abandoned()
        #: As counted the last time, and what has arrived here since.
        self._counted_bytes = sum(size for _, size, _ in self._files())
        self._arrived_bytes = 0
        self._trimming = asyncio.Lock()
        metrics.cache_bytes.set(self._counted_bytes)

    @property
    def writable(self) -> bool:
        """Whether blobs can be put into the folder: it is there, and not on a read-only disk."""
        return os.access(self._blobs, os.W_OK | os.X_OK)

    async def get(self, digest: str, size_bytes: int | None = None) -> Pinned:
        """The file with this content, downloaded if need be.

        A file of another size than `size_bytes` is damaged and fetched again. Raises PhalanxError.
        """
        outcome = "hit"
        arrivals = 0
        while True:
            pinned = self._pin_present(digest, size_bytes)
            if pinned is not None:
                if await self._prove(pinned):
                    break
                continue
            if arrivals == _ARRIVALS_MAX:
                raise DataLoss(
                    f"blob {digest[:12]} arrived {number_of(arrivals, 'time')} and was not "
                    f"{size_bytes} bytes long, or did not stay; check the data set's manifest "
                    "and the cache's folder",
                    reason="BLOB_DOES_NOT_FIT",
                )
            outcome = "miss"
            arrivals += 1
            self._turns.hurry(digest)
            await self._arrival(digest)
        self._later.pop(digest, None)
        self._metrics.cache_requests_total.labels(outcome=outcome).inc()
        if outcome == "miss":
            # Only now that it is pinned, or it might be the first to go.
            try:
                await self._trim()
            except BaseException:
                pinned.release()
                raise
        return pinned

    def prefetch(self, digest: str, size_bytes: int | None = None) -> None:
        """Start to fetch a blob that will be needed soon; more than a bounded number is ignored."""
        if digest in self._arriving or (
            not self._is_present(digest, size_bytes)
            and self._fetch_ahead(digest, self._prefetching)
        ):
            self._turns.hurry(digest)

    def prefetch_later(self, digest: str, size_bytes: int) -> None:
        """Fetch a blob that will be needed some time, after all that is needed sooner.

        Ignored where what is wanted later would take more than half of the cache: it would only
        drive out what is wanted sooner.
        """
        if digest in self._arriving or self._is_present(digest, size_bytes):
            return
        now_s = time.monotonic()
        # What nobody has asked for meanwhile was for shards that have moved away.
        self._later = {
            name: noted for name, noted in self._later.items() if now_s - noted[0] < _LATER_S
        }
        others_bytes = sum(size for name, (_, size) in self._later.items() if name != digest)
        fits = others_bytes + size_bytes <= self.limit_bytes // 2
        if fits and self._fetch_ahead(digest, self._reading_ahead):
            self._later[digest] = now_s, size_bytes

    def _fetch_ahead(self, digest: str, running: set[asyncio.Task[None]]) -> bool:
        if len(running) >= _PREFETCHES_MAX:
            return False

        async def fetch() -> None:
            # Whoever needs the blob meets the error again and reports it.
            with contextlib.suppress(Exception):
                await self._arrival(digest)
                await self._trim()

        task = asyncio.create_task(fetch())
        running.add(task)
        task.add_done_callback(running.discard)
        return True

    async def close(self) -> None:
        """Stop downloads and let go of all pins."""
        tasks = [*self._prefetching, *self._reading_ahead, *self._arriving.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for pin in self._pins.values():
            os.close(pin.fd)
        self._pins.clear()

    # Present files

    def _path(self, digest: str) -> Path:
        # Names come from manifests and from leaf processes, which run other people's code.
        check_blob_id(digest)
        return self._blobs / digest[:2] / digest

    def _is_present(self, digest: str, size_bytes: int | None) -> bool:
        try:
            size = self._path(digest).stat().st_size
        except (OSError, InvalidArgument):
            return False
        return size_bytes is None or size == size_bytes

    def _pin_present(self, digest: str, size_bytes: int | None) -> Pinned | None:
        path = self._path(digest)
        pin = self._pins.get(digest)
        if pin is None or not path.exists():
            fd = _open_locked(path)
            if fd is None:
                return None
            if size_bytes is not None and os.fstat(fd).st_size != size_bytes:
                _log.warning("cached_blob_damaged", digest=digest)
                os.close(fd)
                path.unlink(missing_ok=True)
                return None
            if pin is not None:
                os.close(pin.fd)
                pin.fd = fd
            else:
                pin = self._pins[digest] = _Pin(fd)
        os.utime(pin.fd)
        pin.users += 1
        return Pinned(path, digest, self)

    async def _prove(self, pinned: Pinned) -> bool:
        """Whether a file that was there holds what it is named by; a damaged one is removed.

        Looked at once: what an earlier process left may have lost its content with the power, or
        to the disk.
        """
        digest, inode = pinned.digest, os.fstat(self._pins[pinned.digest].fd).st_ino
        if self._proven.get(digest) == inode:
            return True
        try:
            whole = await asyncio.to_thread(_sha256, pinned.path) == digest
        except FileNotFoundError:
            whole = False
        except BaseException:
            pinned.release()
            raise
        if whole:
            self._note_proven(digest, inode)
            return True
        _log.warning("cached_blob_damaged", digest=digest)
        pinned.release()
        pinned.path.unlink(missing_ok=True)
        return False

    def _note_proven(self, digest: str, inode: int) -> None:
        self._proven[digest] = inode
        self._proven.move_to_end(digest)
        if len(self._proven) > _PROVEN_MAX:
            self._proven.popitem(last=False)

    def unpin(self, digest: str) -> None:
        """One user less; `Pinned.release` calls it."""
        pin = self._pins.get(digest)
        if pin is not None:
            pin.users -= 1
            if pin.users <= 0:
                os.close(pin.fd)
                del self._pins[digest]

    # Arriving files

    async def _arrival(self, digest: str) -> None:
        """Wait until the blob has arrived; all who want it share one download."""
        task = self._arriving.get(digest)
        if task is None:
            task = asyncio.create_task(self._fetch(digest))
            self._arriving[digest] = task
            task.add_done_callback(lambda _: self._arriving.pop(digest, None))
        await asyncio.shield(task)

    async def _fetch(self, digest: str) -> None:
        async with self._turns.turn(digest):
            path = self._path(digest)
            path.parent.mkdir(exist_ok=True)
            try:
                await self._fetch_to(path, digest)
            except (OSError, ResourceExhausted) as error:
                if isinstance(error, OSError) and error.errno != errno.ENOSPC:
                    raise
                # The disk is shared: make all the room that we can and try once more.
                await asyncio.to_thread(self._make_room, 0)
                await self._fetch_or_say_full(path, digest)

    async def _trim(self) -> None:
        """Look through the folder when it is full, or when much has arrived since the last time,
        as others may fill it as well. Many files take long to look through, so room is made for
        an eighth of the limit."""
        if not self._is_full or self._trimming.locked():
            return
        async with self._trimming:
            await asyncio.to_thread(self._make_room, self.limit_bytes)

    @property
    def _is_full(self) -> bool:
        counted = self._counted_bytes + self._arrived_bytes > self.limit_bytes
        return counted or self._arrived_bytes > self.limit_bytes // 16

    async def _fetch_or_say_full(self, path: Path, digest: str) -> None:
        try:
            await self._fetch_to(path, digest)
        except (OSError, ResourceExhausted) as error:
            raise ResourceExhausted(
                f"the disk of the worker's cache is full ({error}); "
                "free space, or point --cache-dir to another disk",
                reason="CACHE_DISK_FULL",
            ) from error

    async def _fetch_to(self, path: Path, digest: str) -> None:
        await self._download(digest, path)
        try:
            status = os.stat(path)
        except FileNotFoundError:
            return  # Another worker has made room; whoever needs it finds that out.
        self._note_proven(digest, status.st_ino)
        self._arrived_bytes += status.st_size
        self._metrics.cache_bytes.set(self._counted_bytes + self._arrived_bytes)

    def _make_room(self, limit_bytes: int) -> None:
        """If there are more than `limit_bytes`, remove what was not used for longest until there
        is an eighth less."""
        arrived_bytes = self._arrived_bytes
        files = sorted(self._files())
        total = sum(size for _, size, _ in files)
        if total > limit_bytes:
            for _, size, path in files:
                if total <= limit_bytes - limit_bytes // 8:
                    break
                if _remove_unused(path):
                    total -= size
        self._counted_bytes = total
        self._arrived_bytes -= arrived_bytes
        self._metrics.cache_bytes.set(total)

    def _files(self) -> list[tuple[float, int, Path]]:
        """(time of last use, size, path) of each file."""
        files = []
        with os.scandir(self._blobs) as folders:
            for folder in folders:
                # It may be gone, or somebody else's.
                with contextlib.suppress(OSError), os.scandir(folder) as found:
                    for file in found:
                        with contextlib.suppress(FileNotFoundError):
                            status = file.stat()
                            if not file.name.startswith("."):
                                files.append((status.st_mtime, status.st_size, Path(file.path)))
        return files

    def _remove_abandoned(self) -> None:
        """Remove partial files whose writer is long gone."""
        for path in self._blobs.glob("*/.*.part"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _ABANDONED_S:
                    path.unlink()


def _open_locked(path: Path) -> int | None:
    """Open and lock a file for use; None where it is absent or about to be removed."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    if os.fstat(fd).st_nlink == 0:
        os.close(fd)
        return None
    return fd


def _remove_unused(path: Path) -> bool:
    """Remove a file unless someone has it locked."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
