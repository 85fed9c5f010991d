"""The command that reads what tasks returned, and the files that programs left."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phalanx.cli.commands.data import PANEL
from phalanx.cli.commands.jobs import JOB
from phalanx.cli.context import settings_of
from phalanx.tasks import is_program

if TYPE_CHECKING:
    from phalanx.sdk.values import TaskResult
    from phalanx.v1.job_pb2 import ResultFile


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
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write a file that the job left."),
    ] = None,
    name: Annotated[
        str, typer.Option(metavar="NAME", help="Which of its files, where it left several.")
    ] = "",
) -> None:
    """Show what the tasks of a job returned so far, a line for each, by number.

    Of a program (evaluate, predict, sweep) list the files that it left, or write one with -o: of
    several the one with the ending of FILE.

    With --json each line is an object: task, value or failure, worker_id, seconds, round_trip_s;
    of a program name, digest and size_bytes.

    [bold]Examples[/bold]

    phalanx --json results JOB | jq .value

    phalanx results JOB -o predictions.parquet
    """
    settings = settings_of(context)
    with settings.connect() as cluster:
        job = cluster.get(job_id)
        if output is not None or name:
            job.save(output or Path(name), name)
            return
        if is_program(job.message.spec):
            _list_files(job.message.result.files, as_json=settings.json)
            return
        found = job.results(task or ())
    for each in found:
        if failed and each.failure is None:
            continue
        if settings.json:
            print(json.dumps(_object(each), ensure_ascii=False))
        elif each.failure is not None:
            print(f"{each.task}\tgiven up: {each.failure.message}")
        else:
            print(f"{each.task}\t{json.dumps(each.value, ensure_ascii=False)}")


def _list_files(files: Iterable[ResultFile], *, as_json: bool) -> None:
    for file in files:
        if as_json:
            shown = {"name": file.name, "digest": file.digest, "size_bytes": file.size_bytes}
            print(json.dumps(shown))
        else:
            print(f"{file.name}\t{file.size_bytes} bytes")


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
