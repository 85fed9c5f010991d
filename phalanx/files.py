"""Files that others read while they are written."""

import contextlib
import secrets
from pathlib import Path


def replace_content(path: Path, content: bytes) -> None:
    """Give a file this content at once: readers see the old file or the whole new one.

    Several threads and processes may write the same file; one of them wins.

    Raises:
        OSError: it cannot be written; then the old file is as it was and nothing is left behind.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
