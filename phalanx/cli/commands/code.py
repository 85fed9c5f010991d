"""``phalanx code``: wheels with user code that jobs name by hash."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from phalanx.cli.context import settings_of

group = typer.Typer(no_args_is_help=True, help="Add and list wheels with your own code.")


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    from phalanx.cli.commands.data import PANEL

    app.add_typer(group, name="code", rich_help_panel=PANEL)


@group.command()
def add(
    context: typer.Context,
    wheel: Annotated[Path, typer.Argument(metavar="WHEEL", help="A .whl file in pure Python.")],
) -> None:
    """Store a wheel; write the hash that a job names under code.wheels."""
    from phalanx.cli.output import print_json, say

    settings = settings_of(context)
    with settings.connect() as cluster:
        stored = cluster.code.add(wheel)
    if settings.json:
        print_json(stored.to_json())
        return
    print(stored.sha256)
    say(f"  use it in a job: code: {{wheels: [{stored.sha256}]}}")


@group.command("list")
def list_wheels(context: typer.Context) -> None:
    """List the stored wheels."""
    from phalanx.cli.output import bytes_text, print_json_list, print_table

    settings = settings_of(context)
    with settings.connect() as cluster:
        found = cluster.code.list()
    if settings.json:
        print_json_list("wheels", [wheel.to_json() for wheel in found])
        return
    print_table(
        ("WHEEL", "SIZE", "SHA-256"),
        [(wheel.file_name, bytes_text(wheel.size_bytes), wheel.sha256) for wheel in found],
        empty="no wheels yet; add one with `phalanx code add FILE.whl`",
    )
