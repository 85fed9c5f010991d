"""Commands that look inside: logs, metrics, events."""

from __future__ import annotations

import csv
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from phalanx.cli.commands.jobs import JOB
from phalanx.cli.context import settings_of

if TYPE_CHECKING:
    from phalanx.sdk.values import LogLine

PANEL = "Look inside"
FOLLOW = Annotated[bool, typer.Option("-f", "--follow", metavar="", help="Wait for more.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    for command in (logs, metrics, events):
        app.command(rich_help_panel=PANEL)(command)


def logs(
    context: typer.Context,
    job_id: JOB,
    follow: FOLLOW = False,
    worker: Annotated[str, typer.Option(metavar="W", help="Only of this worker.")] = "",
) -> None:
    """Show what a job's code printed, and its tracebacks."""
    from phalanx.cli.output import print_json
    from phalanx.sdk import methods
    from phalanx.v1.job_service_pb2 import ReadJobLogsRequest

    settings = settings_of(context)
    with settings.connect() as cluster:
        if settings.json:
            request = ReadJobLogsRequest(job_id=job_id, follow=follow, worker_id=worker)
            for item in cluster.backend.stream(methods.READ_JOB_LOGS, request):
                print_json(item)
            return
        for line in cluster.get(job_id).logs(follow=follow, worker_id=worker):
            print(_log_text(line), flush=follow)


def metrics(
    context: typer.Context,
    job_id: JOB,
    as_csv: Annotated[
        bool, typer.Option("--csv", metavar="", help="A line per step and a column per metric.")
    ] = False,
) -> None:
    """Show a job's measured values by step."""
    from phalanx.cli.output import metric_text, print_json, print_table
    from phalanx.sdk.wire_json import message_to_json

    settings = settings_of(context)
    with settings.connect() as cluster:
        points = cluster.get(job_id).metric_messages()
    if settings.json:
        print_json({"points": [message_to_json(point) for point in points]})
        return
    names = sorted({point.name for point in points})
    by_step: dict[int, dict[str, float]] = {}
    for point in points:
        by_step.setdefault(point.step, {})[point.name] = point.value
    if as_csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(["step", *names])
        for step in sorted(by_step):
            writer.writerow([step, *(by_step[step].get(name, "") for name in names)])
        return
    print_table(
        ("STEP", *names),
        [
            (
                step,
                *(
                    metric_text(by_step[step][name]) if name in by_step[step] else ""
                    for name in names
                ),
            )
            for step in sorted(by_step)
        ],
        empty=f"{job_id} has no metrics yet",
    )


def events(
    context: typer.Context,
    job: Annotated[str, typer.Option(metavar="J", help="Only of this job.")] = "",
    follow: FOLLOW = False,
) -> None:
    """Show deaths, moved shards, recoveries, checkpoints."""
    from phalanx.cli.output import print_json
    from phalanx.cli.watch_view import event_text
    from phalanx.sdk.values import event_value

    settings = settings_of(context)
    with settings.connect() as cluster:
        for message in cluster.event_messages(job, follow=follow):
            if settings.json:
                print_json(message)
                continue
            event = event_value(message)
            where = f" [{event.job_id}]" if event.job_id and not job else ""
            print(f"{event.time:%Y-%m-%d} {event_text(event)}{where}", flush=follow)


def _log_text(line: LogLine) -> str:
    place = " ".join(
        part
        for part in (
            line.worker_id,
            f"shard {line.shard}" if line.shard is not None else "",
            f"step {line.step}" if line.step is not None else "",
        )
        if part
    )
    return f"{line.time:%H:%M:%S.%f}"[:-3] + f" {place}  {line.text}".rstrip()
