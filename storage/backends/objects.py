"""What blobs need of an object store. All of it blocks and may be called from any thread.

Errors are those of ``phalanx.errors``: Unavailable where the store does not answer or refuses.
"""

from collections.abc import Sequence
from typing import Protocol

from storage.interfaces import Buffer


class ObjectWriter(Protocol):
    """One object under way; nothing of it can be seen before ``close``. Not thread-safe."""

    def write(self, content: Buffer) -> None:
        """Take the next bytes."""

    def close(self) -> None:
        """Make the object durable and visible, whole."""

    def abort(self) -> None:
        """Leave nothing behind, as far as the store answers; does nothing after ``close``."""


class ObjectStore(Protocol):
    """Objects by key."""

    name: str
    """Where they are, for people."""

    def writer(self, key: str) -> ObjectWriter:
        """Begin an object under a key that was never used before."""

    def read(self, key: str, offset: int, length: int) -> bytes | None:
        """Return a part of an object, shorter at its end; None if there is no such object."""

    def delete(self, keys: Sequence[str]) -> None:
        """Remove objects, where they exist."""

    def owner(self) -> str:
        """Return the token that was left in the store, or nothing (see ``sql.home``)."""

    def claim(self, token: str) -> str:
        """Leave a token in the store unless there is one; return the one that is there then."""
