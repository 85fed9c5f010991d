"""Puts a FaultyDisk under SQLite: a virtual file system around SQLite's own.

SQLite asks its virtual file system for everything it does to files. The one registered here hands
files below the root of a disk to that disk first, and then to SQLite's own one for Unix; it leaves
others alone. It is written with ctypes, so that the very library that ships with Python is tested.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import CFUNCTYPE, POINTER, c_char_p, c_int, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

from phalanx.testing.faulty_disk import FaultyDisk

_NAME = b"phalanx-faulty-disk"
_OPEN_CREATE = 0x4
_SYNC_FOLDER = 0x800 | 0x4000 | 0x80000  # main journal, super journal, write-ahead log
_SHARED_MEMORY_SUFFIX = "-shm"

_OPEN = CFUNCTYPE(c_int, c_void_p, c_void_p, c_void_p, c_int, c_void_p)
_DELETE = CFUNCTYPE(c_int, c_void_p, c_void_p, c_int)
_CLOSE = CFUNCTYPE(c_int, c_void_p)
_TRANSFER = CFUNCTYPE(c_int, c_void_p, c_void_p, c_int, c_int64)
_TRUNCATE = CFUNCTYPE(c_int, c_void_p, c_int64)
_SYNC = CFUNCTYPE(c_int, c_void_p, c_int)
_SIZE = CFUNCTYPE(c_int, c_void_p, c_void_p)
_SHARE = CFUNCTYPE(c_int, c_void_p, c_int, c_int, c_int, c_void_p)
_RANDOMNESS = CFUNCTYPE(c_int, c_void_p, c_int, c_void_p)


class _Methods(ctypes.Structure):
    _fields_ = [
        ("version", c_int),
        *(
            (name, c_void_p)
            for name in (
                *("close", "read", "write", "truncate", "sync", "file_size", "lock", "unlock"),
                *("check_reserved_lock", "file_control", "sector_size", "characteristics"),
                *("shm_map", "shm_lock", "shm_barrier", "shm_unmap", "fetch", "unfetch"),
            )
        ),
    ]


class _File(ctypes.Structure):
    _fields_ = [("methods", POINTER(_Methods))]


class _Vfs(ctypes.Structure):
    _fields_ = [
        ("version", c_int),
        ("file_bytes", c_int),
        ("path_limit", c_int),
        ("next", c_void_p),
        ("name", c_char_p),
        ("data", c_void_p),
        *(
            (name, c_void_p)
            for name in (
                *("open", "delete", "access", "full_path", "dl_open", "dl_error", "dl_sym"),
                *("dl_close", "randomness", "sleep", "current_time", "last_error"),
                *("current_time_64", "set_system_call", "get_system_call", "next_system_call"),
            )
        ),
    ]


class Unsupported(Exception):
    """This Python's SQLite cannot be reached; the message says why."""


@dataclass
class _OpenFile:
    disk: FaultyDisk
    node: int
    path: str
    original: _Methods
    # Of a journal that may be new, SQLite syncs the folder with its first sync.
    folder: int | None


class _Shim:
    """The one virtual file system of this process, and the disks under it."""

    def __init__(self) -> None:
        self.disks: list[FaultyDisk] = []
        self.defects: list[Exception] = []
        self._files: dict[int, _OpenFile] = {}
        self._tables: dict[int, tuple[_Methods, _Methods]] = {}
        self._library = _library()
        self._unix = self._library.sqlite3_vfs_find(None).contents
        self._vfs = _Vfs()
        ctypes.memmove(ctypes.byref(self._vfs), ctypes.byref(self._unix), ctypes.sizeof(_Vfs))
        self._vfs.name = _NAME
        self._unix_open = _OPEN(self._unix.open)
        self._unix_delete = _DELETE(self._unix.delete)
        # Called from C as long as the process lives.
        self._callbacks = {
            "close": _CLOSE(self._close),
            "read": _TRANSFER(self._read),
            "write": _TRANSFER(self._write),
            "truncate": _TRUNCATE(self._truncate),
            "sync": _SYNC(self._sync),
            "file_size": _SIZE(self._size),
            "shm_map": _SHARE(self._share),
        }
        self._vfs_callbacks = (
            _OPEN(self._open),
            _DELETE(self._delete),
            _RANDOMNESS(self._randomness),
        )
        self._vfs.open, self._vfs.delete, self._vfs.randomness = (
            ctypes.cast(callback, c_void_p).value for callback in self._vfs_callbacks
        )

    def register(self) -> None:
        """Make it the one that new connections use."""
        self._library.sqlite3_vfs_register(ctypes.byref(self._vfs), 1)

    def draw_anew(self) -> None:
        """Have SQLite ask for randomness before it draws the next salt of a log."""
        self._library.sqlite3_randomness(0, None)

    def unregister(self) -> None:
        """Give SQLite its own back."""
        self._library.sqlite3_vfs_register(ctypes.byref(self._unix), 1)
        self._library.sqlite3_vfs_unregister(ctypes.byref(self._vfs))

    def _guarded(self, code: int, function: Callable[[], int]) -> int:
        """Run a callback; whatever it raises becomes a code, for C knows no exceptions."""
        try:
            return function()
        except OSError as error:
            if code == sqlite3.SQLITE_IOERR_WRITE and error.errno == errno.ENOSPC:
                return sqlite3.SQLITE_FULL
            if code == sqlite3.SQLITE_IOERR_SHMMAP and error.errno == errno.ENOSPC:
                return sqlite3.SQLITE_IOERR_SHMSIZE
            return code
        except Exception as defect:  # noqa: BLE001
            self.defects.append(defect)
            return sqlite3.SQLITE_INTERNAL

    def _find(self, name: int | None) -> tuple[FaultyDisk, str] | None:
        path = ctypes.string_at(name).decode() if name else ""
        for disk in self.disks:
            relative = disk.path_of(path) if path else None
            if relative is not None:
                return disk, relative
        return None

    def _open(self, vfs: int, name: int, file: int, flags: int, out_flags: int) -> int:
        def open_file() -> int:
            found = self._find(name)
            if found is None:
                return int(self._unix_open(vfs, name, file, flags, out_flags))
            disk, path = found
            # Says that there is nothing to close, should the opening fail.
            c_void_p.from_address(file).value = None
            with disk.lock:
                exists = (disk.root / path).exists()
                disk.enter("open" if exists else "create", path)
                code = int(self._unix_open(vfs, name, file, flags, out_flags))
                if code == sqlite3.SQLITE_OK:
                    self._adopt(disk, path, file, flags, exists)
                return code

        return self._guarded(sqlite3.SQLITE_CANTOPEN, open_file)

    def _adopt(self, disk: FaultyDisk, path: str, file: int, flags: int, exists: bool) -> None:
        parent, _, name = path.rpartition("/")
        folder = disk.model.find(parent)
        if not exists:
            disk.change(lambda model: model.make(folder, name, is_folder=False))
        is_new_journal = flags & _OPEN_CREATE and flags & _SYNC_FOLDER
        node = disk.model.child(folder, name)
        head = _File.from_address(file)
        address = ctypes.addressof(head.methods.contents)
        if address not in self._tables:
            original, ours = _Methods(), _Methods()
            for table in (original, ours):
                ctypes.memmove(ctypes.byref(table), address, ctypes.sizeof(_Methods))
            for method, callback in self._callbacks.items():
                setattr(ours, method, ctypes.cast(callback, c_void_p).value)
            self._tables[address] = original, ours
        original, ours = self._tables[address]
        head.methods = ctypes.pointer(ours)
        self._files[file] = _OpenFile(
            disk, node, path, original, folder if is_new_journal else None
        )

    def _delete(self, vfs: int, name: int, sync_folder: int) -> int:
        def delete() -> int:
            found = self._find(name)
            if found is None or not (found[0].root / found[1]).exists():
                return int(self._unix_delete(vfs, name, sync_folder))
            disk, path = found
            parent, _, base = path.rpartition("/")
            with disk.lock:
                folder = disk.model.find(parent)
                disk.enter("unlink", path)
                code = int(self._unix_delete(vfs, name, 0))
                if code == sqlite3.SQLITE_OK and not path.endswith(_SHARED_MEMORY_SUFFIX):
                    disk.change(lambda model: model.unlink(folder, base))
                if code == sqlite3.SQLITE_OK and sync_folder:
                    try:
                        disk.sync_node("sync", folder, parent)
                    except OSError:
                        return sqlite3.SQLITE_IOERR_DIR_FSYNC
                return code

        return self._guarded(sqlite3.SQLITE_IOERR_DELETE, delete)

    @staticmethod
    def _randomness(_: int, size: int, out: int) -> int:
        """Give the same each time: equal runs leave equal bytes behind."""
        ctypes.memset(out, 7, size)
        return size

    def _close(self, file: int) -> int:
        opened = self._files.pop(file)
        with opened.disk.lock:
            return int(_CLOSE(opened.original.close)(file))

    def _read(self, file: int, buffer: int, length: int, offset: int) -> int:
        opened = self._files[file]

        def read() -> int:
            with opened.disk.lock:
                opened.disk.enter("read", opened.path)
                return int(_TRANSFER(opened.original.read)(file, buffer, length, offset))

        return self._guarded(sqlite3.SQLITE_IOERR_READ, read)

    def _write(self, file: int, buffer: int, length: int, offset: int) -> int:
        opened = self._files[file]

        def write_some(size: int) -> int:
            code = int(_TRANSFER(opened.original.write)(file, buffer, size, offset))
            if code == sqlite3.SQLITE_OK:
                content = ctypes.string_at(buffer, size)
                opened.disk.change(lambda model: model.write(opened.node, offset, content))
            return code

        def write() -> int:
            with opened.disk.lock:
                calls = len(opened.disk.fired)
                try:
                    opened.disk.enter("write", opened.path)
                except OSError:
                    if len(opened.disk.fired) > calls:
                        write_some(length // 2)
                    raise
                return write_some(length)

        return self._guarded(sqlite3.SQLITE_IOERR_WRITE, write)

    def _truncate(self, file: int, size: int) -> int:
        opened = self._files[file]

        def truncate() -> int:
            with opened.disk.lock:
                opened.disk.enter("truncate", opened.path)
                code = int(_TRUNCATE(opened.original.truncate)(file, size))
                if code == sqlite3.SQLITE_OK:
                    opened.disk.change(lambda model: model.cut(opened.node, size))
                return code

        return self._guarded(sqlite3.SQLITE_IOERR_TRUNCATE, truncate)

    def _sync(self, file: int, flags: int) -> int:
        opened = self._files[file]

        def sync() -> int:
            with opened.disk.lock:
                opened.disk.sync_node("sync", opened.node, opened.path)
                if opened.folder is not None:
                    parent = opened.path.rpartition("/")[0]
                    # SQLite does not look at the outcome of this one.
                    with contextlib.suppress(OSError):
                        opened.disk.sync_node("sync", opened.folder, parent)
                    opened.folder = None
                return sqlite3.SQLITE_OK

        return self._guarded(sqlite3.SQLITE_IOERR_FSYNC, sync)

    def _size(self, file: int, size: int) -> int:
        opened = self._files[file]

        def file_size() -> int:
            with opened.disk.lock:
                opened.disk.enter("stat", opened.path)
                return int(_SIZE(opened.original.file_size)(file, size))

        return self._guarded(sqlite3.SQLITE_IOERR_FSTAT, file_size)

    def _share(self, file: int, region: int, size: int, extend: int, out: int) -> int:
        opened = self._files[file]

        def share() -> int:
            with opened.disk.lock:
                opened.disk.enter("share", opened.path + _SHARED_MEMORY_SUFFIX)
                return int(_SHARE(opened.original.shm_map)(file, region, size, extend, out))

        return self._guarded(sqlite3.SQLITE_IOERR_SHMMAP, share)


_shim: _Shim | None = None


@contextmanager
def sqlite_on(disk: FaultyDisk) -> Iterator[None]:
    """Hand SQLite's files below the disk's root to the disk for the length of a ``with``.

    Raises Unsupported where the library inside this Python cannot be reached. Connections that are
    opened inside must be closed before the end. What SQLite draws (the salts of its logs) is the
    same each time.
    """
    global _shim  # noqa: PLW0603
    if _shim is None:
        _shim = _Shim()
    if not _shim.disks:
        _shim.register()
        _shim.draw_anew()
    _shim.disks.append(disk)
    try:
        yield
    finally:
        _shim.disks.remove(disk)
        if not _shim.disks:
            _shim.unregister()
            _shim.draw_anew()
        defects, _shim.defects = _shim.defects, []
    if defects:
        raise defects[0]


def _library() -> Any:
    """Return the very SQLite that the module ``sqlite3`` calls."""
    import _sqlite3

    # Initializes the library.
    sqlite3.connect(":memory:").close()
    path = getattr(_sqlite3, "__file__", None)
    if path is None:
        raise Unsupported("SQLite is built into this Python; its virtual file systems are hidden")
    library = ctypes.CDLL(path)
    try:
        library.sqlite3_vfs_find.restype = POINTER(_Vfs)
        library.sqlite3_vfs_find.argtypes = [c_char_p]
        library.sqlite3_vfs_register.argtypes = [POINTER(_Vfs), c_int]
        library.sqlite3_vfs_unregister.argtypes = [POINTER(_Vfs)]
        library.sqlite3_randomness.argtypes = [c_int, c_void_p]
        library.sqlite3_randomness.restype = None
    except AttributeError as error:
        raise Unsupported(f"this Python's SQLite hides its virtual file systems: {error}") from None
    return library
