"""``python -P -m storage.restore BACKUP --state DIR``: what ``phalanx restore`` runs."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from phalanx.backups.folder import BackupFolder, Snapshot
from phalanx.cli.errors import EXIT_OF_CODE, Exit, file_error, show_error
from phalanx.config import url_of
from phalanx.errors import PhalanxError
from phalanx.texts import number_of
from storage.backends.opening import Places, open_backend
from storage.restoring import Restored, restore

_EPILOG = """
It is read whole and checked first. With the flags of `phalanx storage` it goes into a folder,
PostgreSQL or an object store, whichever it came from; for `phalanx up --state DIR` it is
DIR/storage. Nothing may be there, and no storage may run on it. Exit code 6 where it may not be
restored: it is damaged, or the place is not empty.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Restore; return the exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.state is None and not (arguments.metadata and arguments.blobs):
        parser.error("--state is required, unless --metadata and --blobs are given")
    for flag, schemes in (("metadata", ("postgresql", "postgres")), ("blobs", ("s3",))):
        wrong = url_of(*schemes)(getattr(arguments, flag))
        if wrong:
            parser.error(f"--{flag} {wrong}")
    try:
        restored = _restore(arguments)
    except PhalanxError as error:
        show_error(error, as_json=arguments.json)
        return int(EXIT_OF_CODE[error.code])
    except OSError as error:
        told = file_error(error)
        show_error(told, as_json=arguments.json)
        return int(EXIT_OF_CODE[told.code])
    except KeyboardInterrupt:
        return int(Exit.INTERRUPTED)
    _show(restored, as_json=arguments.json)
    return 0


def _restore(arguments: argparse.Namespace) -> Restored:
    folder = BackupFolder(arguments.backup)
    with folder.locked(alone=False):
        snapshot: Snapshot = folder.load(arguments.snapshot)
        places = Places(arguments.state, arguments.metadata, arguments.blobs)
        return restore(
            folder, snapshot, partial(open_backend, places), with_damage=arguments.with_damage
        )


def _show(restored: Restored, *, as_json: bool) -> None:
    snapshot = restored.snapshot
    if as_json:
        found = {"snapshot": snapshot.name, "rows": restored.rows, "blobs": restored.blobs}
        print(json.dumps(found))
        return
    what = f"{number_of(restored.rows, 'row')} and {number_of(restored.blobs, 'blob')}"
    print(f"restored {snapshot.name} of {snapshot.created:%Y-%m-%d %H:%M:%S} UTC: {what}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="phalanx restore",
        description="Restore a backup into an empty place.",
        epilog=_EPILOG,
    )
    parser.add_argument("backup", type=Path, metavar="BACKUP", help="Folder of `phalanx backup`.")
    parser.add_argument(
        "--snapshot", default="", metavar="NAME", help="Which snapshot. Default: the newest."
    )
    parser.add_argument("--state", type=Path, metavar="DIR", help="As of `phalanx storage`.")
    for flag, url in (("metadata", "postgresql://…"), ("blobs", "s3://…")):
        variable = f"PHALANX_STORAGE_{flag.upper()}"
        parser.add_argument(
            f"--{flag}",
            default=os.environ.get(variable, ""),
            metavar="URL",
            help=f"{url}, as of `phalanx storage`. Default: ${variable}.",
        )
    parser.add_argument(
        "--with-damage",
        action="store_true",
        help="Restore one that was made of damaged storage, too, as it was.",
    )
    parser.add_argument("--json", action="store_true", help="Write JSON for programs.")
    return parser


if __name__ == "__main__":
    sys.exit(main())
