"""Commands that look inside: logs, metrics, events."""

from __future__ import annotations

import csv
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from phalanx.cli.commands.jobs import JOB
from phalanx.cli.context import Settings, settings_of
from phalanx.errors import InvalidArgument, NotFound

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

    settings = settings_of(context)
    with settings.connect() as cluster:
        job = cluster.get(job_id)
        if settings.json:
            for item in job.log_messages(follow=follow, worker_id=worker):
                print_json(item)
            return
        for line in job.logs(follow=follow, worker_id=worker):
            print(_log_text(line), flush=follow)


def metrics(
    context: typer.Context,
    job_id: JOB,
    as_csv: Annotated[
        bool, typer.Option("--csv", metavar="", help="A line per step and a column per metric.")
    ] = False,
) -> None:
    """Show a job's measured values by step."""
    from phalanx.cli.output import metric_text, print_json_list, print_table

    settings = settings_of(context)
    with settings.connect() as cluster:
        points = cluster.get(job_id).metric_messages()
    if settings.json:
        print_json_list("points", points, points.incomplete)
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
    incidents: Annotated[
        bool,
        typer.Option(
            "--incidents",
            metavar="",
            help="One line for each failure: seconds until each phase of its recovery.",
        ),
    ] = False,
    incident: Annotated[
        str, typer.Option(metavar="ID", help="The time line of one incident.")
    ] = "",
) -> None:
    """Show deaths, moved shards, recoveries, checkpoints.

    What belongs to one failure carries one incident id, in brackets at the end.

    [bold]Examples[/bold]

    phalanx events -f

    phalanx events --incidents

    phalanx events --incident incident-1-3
    """
    from phalanx.cli.output import print_json
    from phalanx.cli.watch_view import event_text
    from phalanx.sdk.values import event_value

    settings = settings_of(context)
    if incident or incidents:
        if follow:
            raise InvalidArgument("--follow does not go with incidents: they are told as a whole")
        if incident and incidents:
            raise InvalidArgument("--incidents lists all and --incident tells one; leave one out")
        _show_incidents(settings, job, incident)
        return
    with settings.connect() as cluster:
        if job:
            # Without it a wrong id would look like a job to which nothing happened.
            cluster.get(job)
        for message in cluster.event_messages(job, follow=follow):
            if settings.json:
                print_json(message)
                continue
            event = event_value(message)
            where = f" [{event.job_id}]" if event.job_id and not job else ""
            where += f" [{event.incident_id}]" if event.incident_id else ""
            print(f"{event.time:%Y-%m-%d} {event_text(event)}{where}", flush=follow)


def _show_incidents(settings: Settings, job: str, incident: str) -> None:
    from phalanx.cli.incident_view import COLUMNS, by_incident, cells, summary, time_line
    from phalanx.cli.output import console, print_json, print_json_list, print_table
    from phalanx.sdk.values import event_value
    from phalanx.sdk.wire_json import message_to_json

    with settings.connect() as cluster:
        # An incident is told whole, also where it touched other jobs.
        messages = [each for each in cluster.event_messages() if each.incident_id]
    found = by_incident(event_value(each) for each in messages)
    if incident:
        if incident not in found:
            raise NotFound(f"no event belongs to an incident {incident!r}")
        if settings.json:
            events = [message_to_json(each) for each in messages if each.incident_id == incident]
            print_json({**summary(found[incident]), "events": events})
        else:
            for line in time_line(found[incident], console().width):
                print(line)
        return
    rows = [summary(events) for events in found.values()]
    rows = [row for row in rows if not job or job in row["job_ids"]]
    if settings.json:
        print_json_list("incidents", rows)
        return
    print_table(
        ("INCIDENT", "MEMBER", "CAUSE", *COLUMNS),
        [
            (
                row["incident_id"],
                row["member"],
                row["cause"],
                *map(_seconds_text, cells(row)),
            )
            for row in rows
        ],
        empty="nothing has failed; the event log keeps the newest 100,000 events",
    )


def _seconds_text(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.2f}"


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
