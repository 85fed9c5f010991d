"""A real folder on a disk that fails at the call a test chooses, and remembers what is durable.

    disk = FaultyDisk(root, Fault(at_call=17, error=errno.EIO))
    with sqlite_on(disk):                      # SQLite's own files below root count as well
        backend = open_embedded_backend(root / "state", disk=disk)
        ...
    assert disk.fired
    write_image(disk.model.without_power(), elsewhere)

Calls are counted in the order in which they come, those of SQLite and those of the blobs together.
Nothing is really synced: ``model`` knows what a power failure would leave (see ``disk_model``).
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from phalanx.testing.disk_model import DiskModel, read_image
from storage.backends.file_system import OsFileSystem
from storage.interfaces import Buffer

_TAKES_SPACE = frozenset(("allocate", "create", "mkdir", "rename", "share", "sync", "write"))


@dataclass(frozen=True)
class Fault:
    """What fails: call number ``at_call`` (from 1), and if ``lasting`` all later ones as well.

    ENOSPC leaves calls alone that take no space.
    """

    at_call: int
    error: int = errno.EIO
    lasting: bool = False

    def concerns(self, number: int, call: str) -> bool:
        """Say whether this call fails."""
        due = number >= self.at_call if self.lasting else number == self.at_call
        return due and (self.error != errno.ENOSPC or call in _TAKES_SPACE)


@dataclass(frozen=True)
class Call:
    """One call: what it did (``write``, ``sync``, …) and to what, relative to the root."""

    name: str
    path: str


class FaultyDisk(OsFileSystem):
    """A FileSystem below ``root``; ``model`` says what is there before the first call.

    Attributes:
        calls: every call so far, also those that failed.
        fired: the calls that failed.
        ended: whether everything is refused, as if the process had ended.
        changes: what every call did to the model, in order; None for nothing. With ``model``'s
            image of the beginning, they give the disk as it was after any call.
    """

    def __init__(
        self, root: Path, fault: Fault | None = None, *, model: DiskModel | None = None
    ) -> None:
        self.root = root
        self.model = model or DiskModel.of(read_image(root))
        self.calls: list[Call] = []
        self.fired: list[Call] = []
        self.ended = False
        self.changes: list[Callable[[DiskModel], object] | None] = []
        self.lock = threading.RLock()
        self._fault = fault
        # By descriptor: the node and its path.
        self._open: dict[int, tuple[int, str]] = {}
        self._positions: dict[int, int] = {}

    def heal(self) -> None:
        """Let nothing fail any more."""
        with self.lock:
            self._fault = None

    def end(self) -> None:
        """Refuse everything from now on, as if the process had ended."""
        with self.lock:
            self.ended = True

    def enter(self, name: str, path: str) -> None:
        """Count a call; OSError if it has to fail."""
        if self.ended:
            raise OSError(errno.EIO, "the process has ended")
        call = Call(name, path)
        self.calls.append(call)
        self.changes.append(None)
        if self._fault is not None and self._fault.concerns(len(self.calls), name):
            self.fired.append(call)
            raise OSError(self._fault.error, "injected")

    def change(self, change: Callable[[DiskModel], object]) -> None:
        """Note what the call that was entered last did."""
        change(self.model)
        before = self.changes[-1]
        self.changes[-1] = change if before is None else _both(before, change)

    def path_of(self, path: str | os.PathLike[str]) -> str | None:
        """Return a path relative to the root, or None if it is outside."""
        absolute = Path(path).absolute()
        if not absolute.is_relative_to(self.root):
            return None
        relative = absolute.relative_to(self.root).as_posix()
        return "" if relative == "." else relative

    def sync_node(self, name: str, node: int, path: str) -> None:
        """Sync a file or folder of the model; a failure loses what was written."""
        try:
            self.enter(name, path)
        except OSError:
            if not self.ended:
                self.change(lambda model: model.fail_to_sync(node))
            raise
        self.change(lambda model: model.sync(node))

    def make_root(self, path: Path) -> None:
        """Make the folder at a path; those above it must be there."""
        with self.lock:
            relative = self._inside(path)
            self.enter("mkdir", relative)
            if path.exists():
                return
            super().make_root(path)
            parent, _, name = relative.rpartition("/")
            folder = self.model.find(parent)
            self.change(lambda model: model.make(folder, name, is_folder=True))

    def open_root(self, path: Path) -> int:
        """Open the folder at a path."""
        with self.lock:
            relative = self._inside(path)
            self.enter("open", relative)
            return self._opened(super().open_root(path), self.model.find(relative), relative)

    def open_folder(self, name: str, parent: int) -> int:
        """Open a folder inside another."""
        with self.lock:
            path = self._enter("open", parent, name)
            return self._opened(super().open_folder(name, parent), self._child(parent, name), path)

    def open_file(self, name: str, folder: int) -> int:
        """Open a file for reading."""
        with self.lock:
            path = self._enter("open", folder, name)
            return self._opened(super().open_file(name, folder), self._child(folder, name), path)

    def open_for_update(self, name: str, folder: int) -> int:
        """Open a file for reading and writing."""
        with self.lock:
            path = self._enter("open", folder, name)
            descriptor = super().open_for_update(name, folder)
            return self._opened(descriptor, self._child(folder, name), path)

    def create_file(self, name: str, folder: int) -> int:
        """Create a file that does not exist yet."""
        with self.lock:
            path = self._enter("create", folder, name)
            descriptor = super().create_file(name, folder)
            self._make(folder, name, is_folder=False)
            return self._opened(descriptor, self._child(folder, name), path)

    def open_lock(self, name: str, folder: int) -> int:
        """Open a file for reading and writing, and create it if it is missing."""
        with self.lock:
            path = self._enter("create", folder, name)
            exists = name in os.listdir(folder)
            descriptor = super().open_lock(name, folder)
            if not exists:
                self._make(folder, name, is_folder=False)
            return self._opened(descriptor, self._child(folder, name), path)

    def close(self, descriptor: int) -> None:
        """Close a file or folder; that never fails, and an ended process has done it."""
        with self.lock:
            self._open.pop(descriptor, None)
            self._positions.pop(descriptor, None)
            super().close(descriptor)

    def make_folder(self, name: str, parent: int) -> bool:
        """Make a folder unless it is there."""
        with self.lock:
            self._enter("mkdir", parent, name)
            made = super().make_folder(name, parent)
            if made:
                self._make(parent, name, is_folder=True)
            return made

    def names(self, folder: int) -> list[str]:
        """List a folder."""
        with self.lock:
            self._enter("list", folder)
            return super().names(folder)

    def status(self, name: str, folder: int) -> os.stat_result:
        """Describe what has this name."""
        with self.lock:
            self._enter("stat", folder, name)
            return super().status(name, folder)

    def size_bytes(self, file: int) -> int:
        """Return the size of an open file."""
        with self.lock:
            self._enter("stat", file)
            return super().size_bytes(file)

    def free_bytes(self, folder: int) -> int:
        """Return how much of the disk may still be taken."""
        with self.lock:
            self._enter("stat", folder)
            return super().free_bytes(folder)

    def read(self, file: int, length: int, offset: int) -> bytes:
        """Read up to ``length`` bytes."""
        with self.lock:
            self._enter("read", file)
            return super().read(file, length, offset)

    def write(self, file: int, content: Buffer) -> int:
        """Write at the file's position; where it fails, half of it has been written."""
        with self.lock:
            whole = bytes(content)
            try:
                self._enter("write", file)
            except OSError:
                if not self.ended:
                    self._append(file, whole[: len(whole) // 2])
                raise
            return self._append(file, whole)

    def truncate(self, file: int, size_bytes: int) -> None:
        """Cut a file off."""
        with self.lock:
            self._enter("truncate", file)
            super().truncate(file, size_bytes)
            node = self._open[file][0]
            self.change(lambda model: model.cut(node, size_bytes))

    def allocate(self, file: int, size_bytes: int) -> None:
        """Reserve disk space for the file."""
        with self.lock:
            self._enter("allocate", file)
            super().truncate(file, size_bytes)
            node = self._open[file][0]
            self.change(lambda model: model.cut(node, size_bytes))

    def sync(self, descriptor: int) -> None:
        """Make a file's content, or a folder's names, durable as far as the model goes."""
        with self.lock:
            node, path = self._open[descriptor]
            self.sync_node("sync", node, path)

    def rename(self, name: str, folder: int, new_name: str, new_folder: int) -> None:
        """Move a file."""
        with self.lock:
            self._enter("rename", folder, name)
            super().rename(name, folder, new_name, new_folder)
            source, target = self._open[folder][0], self._open[new_folder][0]
            self.change(lambda model: model.rename(source, name, target, new_name))

    def unlink(self, name: str, folder: int) -> None:
        """Remove a file."""
        with self.lock:
            self._enter("unlink", folder, name)
            super().unlink(name, folder)
            node = self._open[folder][0]
            self.change(lambda model: model.unlink(node, name))

    def touch(self, name: str, folder: int) -> None:
        """Set a file's times to now."""
        with self.lock:
            self._enter("touch", folder, name)
            super().touch(name, folder)

    def _enter(self, call: str, descriptor: int, name: str = "") -> str:
        path = self._open[descriptor][1]
        path = f"{path}/{name}" if path and name else path or name
        self.enter(call, path)
        return path

    def _inside(self, path: Path) -> str:
        relative = self.path_of(path)
        assert relative is not None, f"{path} is not below {self.root}"
        return relative

    def _child(self, descriptor: int, name: str) -> int:
        return self.model.child(self._open[descriptor][0], name)

    def _make(self, descriptor: int, name: str, *, is_folder: bool) -> None:
        folder = self._open[descriptor][0]
        self.change(lambda model: model.make(folder, name, is_folder=is_folder))

    def _opened(self, descriptor: int, node: int, path: str) -> int:
        self._open[descriptor] = node, path
        return descriptor

    def _append(self, file: int, content: bytes) -> int:
        node = self._open[file][0]
        offset = self._positions.get(file, 0)
        length = super().write(file, content)
        self._positions[file] = offset + length
        self.change(lambda model: model.write(node, offset, content[:length]))
        return length


def _both(
    first: Callable[[DiskModel], object], second: Callable[[DiskModel], object]
) -> Callable[[DiskModel], None]:
    def change(model: DiskModel) -> None:
        first(model)
        second(model)

    return change
