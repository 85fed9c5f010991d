"""A disk that keeps what was synced and may lose, keep or tear everything else when power goes.

disk.write("upload", b"…")     # in memory
disk.sync("upload")            # on the platter
disk.rename("upload", "blob")  # visible at once, durable after sync_folder()
disk.crash(chance)             # what a restart finds
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field


class DiskFull(OSError):
    """ENOSPC."""


class DiskFailed(OSError):
    """EIO."""


@dataclass
class _File:
    content: bytearray = field(default_factory=bytearray)
    synced_bytes: int = 0


class SimulatedDisk:
    """One folder of files. `full` and `failing` make writes and syncs fail."""

    def __init__(self) -> None:
        self._visible: dict[str, _File] = {}
        self._durable: dict[str, _File] = {}
        self.full = False
        self.failing = False
        self.refused = 0
        """Writes that found no room."""
        self.failed = 0
        """Writes and syncs that failed otherwise."""
        self.torn = 0
        """Files that a loss of power cut off behind what was synced."""
        self.lost = 0
        """Names that it took away."""

    def demand_room(self, name: str) -> None:
        """Raise `DiskFull` where there is none for a write."""
        if self.full:
            self.refused += 1
            raise DiskFull(f"there is no room for {name}")

    def demand_working(self, name: str) -> None:
        """Raise `DiskFailed` where nothing can be written or synced."""
        if self.failing:
            self.failed += 1
            raise DiskFailed(f"{name} cannot be written or synced")

    def write(self, name: str, data: bytes | bytearray | memoryview) -> None:
        """Append to a file, which is made if need be."""
        self.demand_working(name)
        self.demand_room(name)
        self._visible.setdefault(name, _File()).content += data

    def sync(self, name: str) -> None:
        """Make the content of a file durable."""
        self.demand_working(name)
        file = self._visible[name]
        file.synced_bytes = len(file.content)

    def rename(self, name: str, target: str) -> None:
        """Give a file another name, in place of whatever had it."""
        self._visible[target] = self._visible.pop(name)

    def remove(self, name: str) -> None:
        """Take a name away."""
        self._visible.pop(name, None)

    def sync_folder(self) -> None:
        """Make the names durable."""
        self.demand_working("the folder")
        self._durable = dict(self._visible)

    def names(self) -> list[str]:
        """Every name that is visible."""
        return list(self._visible)

    def read(self, name: str) -> bytes | None:
        """The content of a file."""
        file = self._visible.get(name)
        return None if file is None else bytes(file.content)

    def damage(self, name: str, bit: int) -> None:
        """Flip one bit, as rot does."""
        content = self._visible[name].content
        content[bit // 8 % len(content)] ^= 1 << bit % 8

    def crash(self, chance: random.Random) -> None:
        """Lose power: names that were not synced may be there or not, contents may be torn."""
        found: dict[str, _File] = {}
        for name in [*self._durable, *(n for n in self._visible if n not in self._durable)]:
            before, now = self._durable.get(name), self._visible.get(name)
            file = before if before is now or chance.random() < 0.5 else now
            if file is None:
                self.lost += 1
                continue
            unsynced = len(file.content) - file.synced_bytes
            if unsynced and chance.random() < 0.7:
                kept = chance.randrange(unsynced)
                del file.content[file.synced_bytes + kept :]
                self.torn += 1
            file.synced_bytes = len(file.content)
            found[name] = file
        self._visible, self._durable = found, dict(found)
