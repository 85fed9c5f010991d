"""The services themselves, one process each; compose files and Kubernetes use these."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import typer

NAMES = frozenset({"storage", "coordinator", "aggregator", "worker"})
PANEL = "Services (one process each)"
_PASS = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    for command in (storage, coordinator, aggregator, worker):
        app.command(rich_help_panel=PANEL, context_settings=dict(_PASS), add_help_option=False)(
            command
        )


def storage(context: typer.Context) -> None:
    """Run the storage service; --help shows its options."""
    become(["storage"], context.args)


def coordinator(context: typer.Context) -> None:
    """Run a control process; --help shows its options."""
    become(["coordinator", "control"], context.args)


def aggregator(context: typer.Context) -> None:
    """Run an aggregator; --help shows its options."""
    become(["coordinator", "aggregator"], context.args)


def worker(context: typer.Context) -> None:
    """Run a worker; --help shows its options."""
    become(["worker"], context.args)


def become(module: Sequence[str], arguments: Sequence[str]) -> NoReturn:
    """Replace this process, so that signals and the exit code are the service's own."""
    sys.stdout.flush()
    # -P: a file storage.py in the working folder must not be taken for the service.
    os.execv(sys.executable, [sys.executable, "-P", "-m", *module, *arguments])  # noqa: S606
