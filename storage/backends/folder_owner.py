"""Which database the blobs of a state folder belong to, if that is not in the folder itself."""

import contextlib

from phalanx.errors import FailedPrecondition
from storage.backends.file_system import THIS_MACHINE, FileSystem
from storage.backends.files import DATABASE_NAME, StateFolder, read_errors, write_errors

_FILE_NAME = "owner"
_NEW_NAME = "owner.new"
_TOKEN_BYTES = 64


class FolderOwner:
    """A Place of ``sql.home``; the folder is this process's, so nobody else writes there."""

    def __init__(self, folder: StateFolder, disk: FileSystem = THIS_MACHINE) -> None:
        self.name = f"the folder {folder.path}"
        self._folder = folder
        self._disk = disk

    def owner(self) -> str:
        """Return the token in the folder."""
        with read_errors("the owner of the state folder"):
            try:
                file = self._disk.open_file(_FILE_NAME, self._folder.fd)
            except FileNotFoundError:
                return ""
            try:
                return self._disk.read(file, _TOKEN_BYTES, 0).decode("ascii", "replace")
            finally:
                self._disk.close(file)

    def claim(self, token: str) -> str:
        """Leave a token, unless there is one or the folder has a database of its own."""
        found = self.owner()
        if found:
            return found
        if DATABASE_NAME in self._disk.names(self._folder.fd):
            return DATABASE_NAME
        with write_errors("the owner of the state folder"):
            with contextlib.suppress(FileNotFoundError):
                self._disk.unlink(_NEW_NAME, self._folder.fd)
            file = self._disk.create_file(_NEW_NAME, self._folder.fd)
            try:
                self._disk.write(file, token.encode())
                self._disk.sync(file)
            finally:
                self._disk.close(file)
            self._disk.rename(_NEW_NAME, self._folder.fd, _FILE_NAME, self._folder.fd)
            self._disk.sync(self._folder.fd)
        return token


def demand_no_owner(folder: StateFolder, disk: FileSystem = THIS_MACHINE) -> None:
    """Raise FailedPrecondition (BLOBS_ELSEWHERE) where the blobs belong to another database."""
    if FolderOwner(folder, disk).owner():
        raise FailedPrecondition(
            f"the blobs in {folder.path} belong to another database; say so with --metadata",
            reason="BLOBS_ELSEWHERE",
        )
