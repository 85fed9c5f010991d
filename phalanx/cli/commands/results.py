"""The command that reads what independent tasks returned."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phalanx.cli.commands.data import PANEL
from phalanx.cli.commands.jobs import JOB
from phalanx.cli.context import settings_of

if TYPE_CHECKING:
    from phalanx.sdk.values import TaskResult


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command(rich_help_panel=PANEL)(results)


def results(
    context: typer.Context,
    job_id: JOB,
    task: Annotated[
        list[int] | None, typer.Option(metavar="N", help="Only this task; may be given again.")
    ] = None,
    failed: Annotated[
        bool, typer.Option("--failed", metavar="", help="Only tasks that were given up.")
    ] = False,
) -> None:
    """Show what the tasks of a job returned so far, a line for each, by number.

    With --json each line is an object: task, value or failure, worker_id, seconds, round_trip_s.

    [bold]Example[/bold]

    phalanx --json results JOB | jq .value
    """
    settings = settings_of(context)
    with settings.connect() as cluster:
        found = cluster.get(job_id).results(task or ())
    for each in found:
        if failed and each.failure is None:
            continue
        if settings.json:
            print(json.dumps(_object(each), ensure_ascii=False))
        elif each.failure is not None:
            print(f"{each.task}\tgiven up: {each.failure.message}")
        else:
            print(f"{each.task}\t{json.dumps(each.value, ensure_ascii=False)}")


def _object(result: TaskResult) -> dict[str, Any]:
    shown: dict[str, Any] = {"task": result.task}
    if result.failure is None:
        shown["value"] = result.value
    else:
        shown["failure"] = {
            "code": result.failure.code,
            "message": result.failure.message,
            "attempts": result.failure.attempts,
            "worker_ids": list(result.failure.worker_ids),
            "traceback": result.failure.traceback,
        }
    return {
        **shown,
        "worker_id": result.worker_id,
        "seconds": result.seconds,
        "round_trip_s": result.round_trip_s,
    }
