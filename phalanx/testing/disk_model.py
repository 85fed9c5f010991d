"""What a disk holds, and what it would hold if the power failed now.

A write becomes durable when its file is synced, a name when its folder is. Until then the power may
fail so that any part of it is there: whole sectors of a write, some names of a folder and not
others. After a *failed* sync of a file what was to be written is lost, although it can be read as
long as the machine runs, and a later sync that succeeds does not bring it back: the kernel has
marked the pages clean. (A failed sync of a folder loses nothing: file systems with a journal stop
altogether when they cannot write it.)
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

SECTOR_BYTES = 512

Image = dict[str, bytes | None]
"""A tree of files: content by path relative to the root, None for a folder; parents come first."""


@dataclass(frozen=True)
class _Write:
    offset: int
    content: bytes

    def pieces(self) -> list[_Write]:
        """Cut at the disk's sectors."""
        found = []
        position = 0
        while position < len(self.content):
            length = SECTOR_BYTES - (self.offset + position) % SECTOR_BYTES
            found.append(_Write(self.offset + position, self.content[position : position + length]))
            position += length
        return found

    def apply(self, content: bytearray) -> None:
        if len(content) < self.offset:
            content.extend(bytes(self.offset - len(content)))
        content[self.offset : self.offset + len(self.content)] = self.content


@dataclass(frozen=True)
class _Cut:
    size_bytes: int

    def pieces(self) -> list[_Cut]:
        return [self]

    def apply(self, content: bytearray) -> None:
        if len(content) < self.size_bytes:
            content.extend(bytes(self.size_bytes - len(content)))
        del content[self.size_bytes :]


@dataclass
class _File:
    content: bytearray = field(default_factory=bytearray)
    durable: bytearray = field(default_factory=bytearray)
    pending: list[_Write | _Cut] = field(default_factory=list)


@dataclass
class _Folder:
    names: dict[str, int] = field(default_factory=dict)
    durable: dict[str, int] = field(default_factory=dict)
    pending: list[tuple[str, int | None]] = field(default_factory=list)

    def set(self, name: str, node: int | None) -> None:
        _put(self.names, name, node)
        self.pending.append((name, node))


class DiskModel:
    """Folders and files by number; the root is 0. Numbers are given in the order of creation."""

    def __init__(self) -> None:
        self._nodes: list[_File | _Folder] = [_Folder()]

    @classmethod
    def of(cls, image: Image) -> DiskModel:
        """Return a disk on which all of ``image`` is durable."""
        model = cls()
        for path, content in sorted(image.items()):
            parent, _, name = path.rpartition("/")
            node = model.make(model.find(parent), name, is_folder=content is None)
            if content is not None:
                model.write(node, 0, content)
        for number in range(len(model._nodes)):
            model.sync(number)
        return model

    def find(self, path: str) -> int:
        """Return the number of what a path names; FileNotFoundError."""
        node = 0
        for name in path.split("/") if path else ():
            try:
                node = self._folder(node).names[name]
            except KeyError:
                raise FileNotFoundError(path) from None
        return node

    def child(self, folder: int, name: str) -> int:
        """Return the number of what ``name`` names in a folder; FileNotFoundError."""
        try:
            return self._folder(folder).names[name]
        except KeyError:
            raise FileNotFoundError(name) from None

    def make(self, folder: int, name: str, *, is_folder: bool) -> int:
        """Make an empty file or folder; return its number."""
        self._nodes.append(_Folder() if is_folder else _File())
        number = len(self._nodes) - 1
        self._folder(folder).set(name, number)
        return number

    def write(self, file: int, offset: int, content: bytes) -> None:
        """Write into a file."""
        self._change(file, _Write(offset, content))

    def cut(self, file: int, size_bytes: int) -> None:
        """Set a file's size."""
        self._change(file, _Cut(size_bytes))

    def unlink(self, folder: int, name: str) -> None:
        """Remove a name."""
        self._folder(folder).set(name, None)

    def rename(self, folder: int, name: str, new_folder: int, new_name: str) -> None:
        """Move a name. A crash may show both or, where the old folder was synced first, neither."""
        self._folder(new_folder).set(new_name, self.child(folder, name))
        self._folder(folder).set(name, None)

    def sync(self, node: int) -> None:
        """Make a file's content or a folder's names durable."""
        found = self._nodes[node]
        if isinstance(found, _File):
            for change in found.pending:
                change.apply(found.durable)
        else:
            for name, number in found.pending:
                _put(found.durable, name, number)
        found.pending.clear()

    def fail_to_sync(self, node: int) -> None:
        """Lose what was written to a file since it was synced, though it can still be read."""
        found = self._nodes[node]
        if isinstance(found, _File):
            found.pending.clear()

    def as_it_is(self) -> Image:
        """Return what can be read now: what the next process finds after ``kill -9``."""
        return self._image(
            lambda folder: folder.names,
            lambda file: bytes(file.content),
        )

    def without_power(self) -> Image:
        """Return what is left if nothing survives that was not synced."""
        return self._image(
            lambda folder: folder.durable,
            lambda file: bytes(file.durable),
        )

    def torn(self, draw: random.Random) -> Image:
        """Return what is left if any sectors and names survive of those that were not synced."""

        def names(folder: _Folder) -> dict[str, int]:
            found = dict(folder.durable)
            for name, node in folder.pending:
                if draw.random() < 0.5:
                    _put(found, name, node)
            return found

        def content(file: _File) -> bytes:
            found = bytearray(file.durable)
            for change in file.pending:
                for piece in change.pieces():
                    if draw.random() < 0.5:
                        piece.apply(found)
            return bytes(found)

        return self._image(names, content)

    def _image(
        self, names: Callable[[_Folder], dict[str, int]], content: Callable[[_File], bytes]
    ) -> Image:
        image: Image = {}
        waiting = [("", self._folder(0))]
        while waiting:
            prefix, folder = waiting.pop()
            for name, number in names(folder).items():
                node = self._nodes[number]
                if isinstance(node, _File):
                    image[prefix + name] = content(node)
                else:
                    image[prefix + name] = None
                    waiting.append((f"{prefix}{name}/", node))
        return image

    def _change(self, file: int, change: _Write | _Cut) -> None:
        node = self._nodes[file]
        assert isinstance(node, _File)
        change.apply(node.content)
        node.pending.append(change)

    def _folder(self, number: int) -> _Folder:
        node = self._nodes[number]
        assert isinstance(node, _Folder)
        return node


def write_image(image: Image, root: Path) -> None:
    """Write an image into an empty folder."""
    for path, content in image.items():
        if content is None:
            os.mkdir(f"{root}/{path}", 0o700)
        else:
            Path(f"{root}/{path}").write_bytes(content)


def read_image(root: Path) -> Image:
    """Read a folder."""
    image: Image = {}
    for path in sorted(root.rglob("*")):
        image[str(path.relative_to(root))] = None if path.is_dir() else path.read_bytes()
    return image


def _put(names: dict[str, int], name: str, node: int | None) -> None:
    if node is None:
        names.pop(name, None)
    else:
        names[name] = node
