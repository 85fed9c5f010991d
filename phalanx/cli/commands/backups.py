"""Commands on backups of storage, and the one that looks for damage."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phalanx.cli.commands.cluster import PANEL
from phalanx.cli.commands.services import become
from phalanx.cli.context import Settings, settings_of
from phalanx.texts import number_of

if TYPE_CHECKING:
    from phalanx.backups.folder import BackupFolder, Snapshot
    from phalanx.v1.storage_service_pb2 import Corruption, ScrubResponse

FOUND_DAMAGE = 1


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.command(rich_help_panel=PANEL)(backup)
    app.command(
        rich_help_panel=PANEL,
        context_settings={
            "ignore_unknown_options": True,
            "allow_extra_args": True,
            "help_option_names": [],
        },
        add_help_option=False,
    )(restore)
    app.command(rich_help_panel=PANEL)(scrub)


def backup(
    context: typer.Context,
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder of backups; it is made if it is new.")
    ],
    keep: Annotated[
        int,
        typer.Option(metavar="N", min=0, help="Remove all snapshots but the newest N. 0: none."),
    ] = 0,
    show: Annotated[
        bool, typer.Option("--list", metavar="", help="Only list the snapshots.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", metavar="", help="Only read them all and check them.")
    ] = False,
    prune: Annotated[
        bool, typer.Option("--prune", metavar="", help="Only remove what --keep says.")
    ] = False,
) -> None:
    """Save all that storage has, as of one moment, while it runs.

    Only what is new since the last backup into the same folder is written. What is there is
    checked, too. Takes a token of an administrator for all namespaces.

    Exit code 1 when something is damaged: in storage (the rest is saved), or with --verify in the
    backups.

    [bold]Examples[/bold]

    phalanx backup /backups/phalanx --keep 14

    phalanx backup /backups/phalanx --verify
    """
    from phalanx.backups.folder import BackupFolder
    from phalanx.errors import InvalidArgument

    settings = settings_of(context)
    if show + verify + prune > 1:
        raise InvalidArgument("--list, --verify and --prune exclude each other")
    if prune and not keep:
        raise InvalidArgument("--prune needs --keep N")
    if show or verify:
        opened = BackupFolder(folder)
        with opened.locked(alone=False):
            if show:
                _list(opened, settings)
            else:
                _verify(opened, settings)
        return
    opened = BackupFolder(folder, create=not prune)
    with opened.locked(alone=True):
        # Those that are whole do not make room for one that is not.
        if not prune and not _save(opened, settings):
            raise typer.Exit(FOUND_DAMAGE)
        if keep:
            _prune(opened, keep, settings)


def restore(context: typer.Context) -> None:
    """Restore a backup into an empty place; --help shows its options."""
    arguments = ["--json"] if settings_of(context).json else []
    become(["storage.restore"], [*context.args, *arguments])


def scrub(context: typer.Context) -> None:
    """Read all that is stored now, and look for damage.

    Storage does so by itself in the background. Takes a token of an administrator for all
    namespaces. Exit code 1 when something is damaged: it says what, and what it belongs to.
    """
    from phalanx.cli.output import bytes_text, print_json

    settings = settings_of(context)
    found: list[Corruption] = []
    last: ScrubResponse | None = None
    with settings.connect() as cluster:
        for last in cluster.scrub():
            found += last.corruptions
            if settings.json:
                continue
            for corruption in last.corruptions:
                names = ", ".join(corruption.named_by)
                print(f"DAMAGED  {corruption.message}{f' (named by {names})' if names else ''}")
    rows, blobs, size_bytes = (
        (last.rows_read, last.blobs_read, last.bytes_read) if last is not None else (0, 0, 0)
    )
    if settings.json:
        from phalanx.sdk.wire_json import message_to_json

        print_json(
            {
                "rows": rows,
                "blobs": blobs,
                "bytes": size_bytes,
                "corruptions": [message_to_json(each) for each in found],
            }
        )
    else:
        print(
            f"read {number_of(rows, 'row')} and {number_of(blobs, 'blob')} "
            f"({bytes_text(size_bytes)}): {number_of(len(found), 'corruption')}"
        )
    raise typer.Exit(FOUND_DAMAGE if found else 0)


def _save(folder: BackupFolder, settings: Settings) -> bool:
    """Make a backup; return whether all could be saved."""
    from phalanx.backups.saving import save
    from phalanx.cli.output import bytes_text, print_json

    with settings.connect() as cluster:
        saved = save(cluster.backend, folder)
    snapshot = saved.snapshot
    if settings.json:
        new = {"new_blobs": saved.new_blobs, "new_bytes": saved.new_bytes}
        print_json({**_to_json(snapshot), **new})
    else:
        print(
            f"{snapshot.name}: {number_of(snapshot.rows, 'row')}, "
            f"{number_of(snapshot.blobs, 'blob')} ({bytes_text(snapshot.blob_bytes)}), "
            f"{saved.new_blobs} of them new ({bytes_text(saved.new_bytes)})"
        )
    for damage in snapshot.damage:
        print(f"DAMAGED in storage: {damage.message}", file=sys.stderr)
    return not snapshot.damage


def _prune(folder: BackupFolder, keep: int, settings: Settings) -> None:
    from phalanx.cli.output import bytes_text, say

    superfluous = folder.names()[:-keep]
    for name in superfluous:
        folder.remove(name)
    blobs, size_bytes = folder.sweep()
    if not settings.json:
        say(
            f"removed {number_of(len(superfluous), 'snapshot')} and {number_of(blobs, 'blob')} "
            f"({bytes_text(size_bytes)})"
        )


def _list(folder: BackupFolder, settings: Settings) -> None:
    from phalanx.cli.output import bytes_text, print_json, print_table

    snapshots = [folder.load(name) for name in folder.names()]
    if settings.json:
        print_json({"snapshots": [_to_json(snapshot) for snapshot in snapshots]})
        return
    print_table(
        ("SNAPSHOT", "MADE (UTC)", "ROWS", "BLOBS", "SIZE", "DAMAGED"),
        [
            (
                snapshot.name,
                f"{snapshot.created:%Y-%m-%d %H:%M:%S}",
                snapshot.rows,
                snapshot.blobs,
                bytes_text(snapshot.blob_bytes + snapshot.rows_bytes),
                len(snapshot.damage),
            )
            for snapshot in snapshots
        ],
        empty="no snapshots",
    )


def _verify(folder: BackupFolder, settings: Settings) -> None:
    from phalanx.backups.checking import check
    from phalanx.cli.output import print_json
    from phalanx.errors import FailedPrecondition

    wrong: dict[str, list[str]] = {}
    for name in folder.names():
        try:
            wrong[name] = check(folder, folder.load(name))
        except FailedPrecondition as error:
            wrong[name] = [error.message]
    if settings.json:
        print_json({"snapshots": [{"name": name, "wrong": wrong[name]} for name in wrong]})
    else:
        for name, found in wrong.items():
            print(f"{name}: {'; '.join(found) or 'all as it was saved'}")
        if not wrong:
            print("no snapshots")
    if any(wrong.values()):
        raise typer.Exit(FOUND_DAMAGE)


def _to_json(snapshot: Snapshot) -> dict[str, object]:
    return {
        "name": snapshot.name,
        "created": snapshot.created.isoformat(),
        "rows": snapshot.rows,
        "blobs": snapshot.blobs,
        "bytes": snapshot.blob_bytes + snapshot.rows_bytes,
        "damage": [{"digest": each.digest, "message": each.message} for each in snapshot.damage],
    }
