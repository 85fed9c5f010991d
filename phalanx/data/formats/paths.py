"""What a path has to lead to before a format opens it."""

import stat
from pathlib import Path

from phalanx.errors import InvalidArgument, NotFound

_KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}


def check_path(path: Path) -> None:
    """Raises NotFound where nothing is, and InvalidArgument for what is no file and no folder.

    Nothing is opened: a pipe that nobody writes into would never answer.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFound(f"there is no file {path}") from error
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise InvalidArgument(f"cannot read {str(path)!r}: {why.lower()}") from error
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "a device")
        raise InvalidArgument(
            f"{path} is {kind}, and data are read more than once; write them to a file first and "
            "name that",
            reason="NO_FILE",
        )
