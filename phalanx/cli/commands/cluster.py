"""Commands on the cluster itself: start, stop, look after it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from phalanx.cli.context import settings_of
from phalanx.texts import number_of

START = "Start here"
PANEL = "Look after the cluster"
STATE = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Folder of its state. Default: $PHALANX_STATE, else ~/.local/state/phalanx.",
    ),
]


def register_start(app: typer.Typer) -> None:
    """Add the commands that a newcomer needs first to the program."""
    for command in (up, down, status, doctor):
        app.command(rich_help_panel=START)(command)


def register(app: typer.Typer) -> None:
    """Add the other commands to the program."""
    for command in (workers, drain, gc):
        app.command(rich_help_panel=PANEL)(command)


def up(
    context: typer.Context,
    workers: Annotated[int, typer.Option(metavar="N", min=0, help="Worker processes.")] = 4,
    port: Annotated[
        int, typer.Option(metavar="P", min=0, max=65535, help="Of the cluster; 0 takes a free one.")
    ] = 7410,
    state: STATE = None,
    detach: Annotated[
        bool,
        typer.Option(
            "--detach", metavar="", help="Return once it is ready; stop it with `phalanx down`."
        ),
    ] = False,
    aggregators: Annotated[int, typer.Option(metavar="N", min=1, help="Aggregator processes.")] = 1,
    controls: Annotated[int, typer.Option(metavar="N", min=1, help="Control processes.")] = 1,
    slots: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Leaf processes per worker. Default: share of cores."
        ),
    ] = None,
    log_level: Annotated[str, typer.Option(metavar="LEVEL", help="Of all processes.")] = "info",
    link_root: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            help="Let `data add --link` leave files below this folder where they are; again for "
            "more folders. Default: none.",
        ),
    ] = None,
    secure: Annotated[
        bool,
        typer.Option(
            "--secure", metavar="", help="Encrypt, and ask for tokens; keys are made at first."
        ),
    ] = False,
) -> None:
    """Start a whole cluster on this machine.

    Storage, control, aggregator and workers are real processes that listen on 127.0.0.1 only;
    what dies is started again. Data, jobs and models
    survive in the state folder.

    [bold]Examples[/bold]

    phalanx up --workers 2

    phalanx up --detach && phalanx status && phalanx down
    """
    from phalanx.cli.commands.local import run_in_foreground, start_in_background
    from phalanx.local.options import LocalOptions
    from phalanx.sdk.discovery import default_state_dir

    settings = settings_of(context)
    options = LocalOptions(
        state_dir=(state or default_state_dir()).absolute(),
        workers=workers,
        aggregators=aggregators,
        controls=controls,
        port=port,
        slots=slots,
        log_level=log_level,
        link_roots=tuple(link_root or ()),
        secure=secure,
    )
    if not detach:
        raise typer.Exit(run_in_foreground(options, settings))
    start_in_background(options, settings)


def down(context: typer.Context, state: STATE = None) -> None:
    """Stop the cluster that `phalanx up` started; its state stays."""
    from phalanx.cli.commands.local import stop_cluster
    from phalanx.cli.output import print_json, say
    from phalanx.sdk.discovery import default_state_dir

    settings = settings_of(context)
    folder = (state or default_state_dir()).absolute()
    stopped = stop_cluster(folder)
    if settings.json:
        print_json({"pid": stopped.pid, "address": stopped.address, "state_dir": str(folder)})
    else:
        say(f"stopped the cluster at {stopped.address}; its state stays in {folder}")


def status(context: typer.Context, state: STATE = None) -> None:
    """Show the cluster at a glance: processes, workers, jobs.

    The processes are shown of a cluster of `phalanx up`; METRICS is where Prometheus may ask.
    """
    from phalanx.cli.commands.local import list_members, state_to_json
    from phalanx.cli.output import print_fields, print_json
    from phalanx.local.state import read_state
    from phalanx.sdk.discovery import default_state_dir
    from phalanx.sdk.wire_json import message_to_json

    settings = settings_of(context)
    folder = (state or default_state_dir()).absolute()
    local = read_state(folder)
    meant = local if state is not None else None
    with settings.connect_local(meant) if meant else settings.connect() as cluster:
        found = cluster.describe()
        # Another cluster may be meant than the one of this machine.
        if local is not None and cluster.address not in (local.address, *local.address.split(",")):
            local = None
        if settings.json:
            shown: dict[str, object] = {"address": cluster.address}
            shown["cluster"] = message_to_json(found)
            shown["local"] = state_to_json(local, folder) if local is not None else None
            print_json(shown)
            return
        states = Counter(_worker_state(worker.state) for worker in found.workers)
        print_fields(
            [
                ("address", cluster.address),
                ("version", found.version),
                ("leader", f"{found.leader}, generation {found.generation}"),
                ("storage", "available" if found.storage_available else "UNAVAILABLE"),
                ("incomplete", found.incomplete),
                ("workers", _counted(states) or "none"),
                ("aggregators", sum(item.connected for item in found.aggregators)),
                ("jobs", _counted(dict(found.jobs)) or "none"),
            ]
        )
    if local is not None:
        print(f"state        {folder}\n")
        list_members(local)


def doctor(context: typer.Context, state: STATE = None) -> None:
    """Check that this machine can run Phalanx.

    Looks at Python, libraries, ports, disk, memory and whether a cluster answers. Exit code 6 when
    something keeps Phalanx from working.
    """
    from phalanx.cli.doctor import PROBLEM, examine
    from phalanx.cli.output import print_json
    from phalanx.sdk.discovery import default_state_dir

    settings = settings_of(context)
    checks = examine((state or default_state_dir()).absolute(), settings)
    healthy = all(check.state != PROBLEM for check in checks)
    if settings.json:
        print_json({"healthy": healthy, "checks": [check.to_json() for check in checks]})
    else:
        for check in checks:
            print(f"{check.state:<8} {check.name:<12} {check.message}")
            if check.advice:
                print(f"{'':<21} → {check.advice}")
    raise typer.Exit(0 if healthy else 6)


def workers(context: typer.Context) -> None:
    """List the workers and what they do."""
    from phalanx.cli.output import bytes_text, print_json_list, print_table
    from phalanx.cli.watch_state import ranges_text, shards_of

    settings = settings_of(context)
    with settings.connect() as cluster:
        found = cluster.workers()
    if settings.json:
        print_json_list("workers", found, found.incomplete)
        return
    print_table(
        ("WORKER", "STATE", "SLOTS", "PID", "MEMORY", "JOB: SHARDS", "REASON"),
        [
            (
                worker.id,
                _worker_state(worker.state),
                worker.slots,
                str(worker.pid),
                bytes_text(worker.resident_bytes) if worker.resident_bytes else "",
                "; ".join(
                    f"{job.job_id}: {ranges_text(shards_of(job.shards)) or '-'}"
                    for job in worker.jobs
                ),
                worker.reason,
            )
            for worker in sorted(found, key=lambda worker: worker.id)
        ],
        empty="no workers; `phalanx up` starts some, `phalanx worker --help` shows how to add one",
    )


def drain(
    context: typer.Context,
    worker_id: Annotated[str, typer.Argument(metavar="WORKER", help="Id of the worker.")],
    wait: Annotated[
        bool, typer.Option("--wait", metavar="", help="Return when it has left.")
    ] = False,
) -> None:
    """Take a worker out; its shards move to the others."""
    from phalanx.cli.output import print_json, say

    settings = settings_of(context)
    with settings.connect() as cluster:
        cluster.drain(worker_id, timeout_s=settings.timeout_s if wait else None)
        if settings.json:
            found = [worker for worker in cluster.workers() if worker.id == worker_id]
            print_json(found[0] if found else {"id": worker_id})
            return
    say(f"{worker_id} has left" if wait else f"{worker_id} is draining; `phalanx workers` shows it")


def gc(
    context: typer.Context,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", metavar="", help="Only say what would go.")
    ] = False,
) -> None:
    """Remove stored data that nothing refers to any more."""
    from phalanx.cli.output import bytes_text, print_json, say

    settings = settings_of(context)
    with settings.connect() as cluster:
        answer = cluster.gc(dry_run=dry_run)
    if settings.json:
        print_json(answer)
        return
    verb = "would be removed" if dry_run else "removed"
    size = bytes_text(answer.bytes_removed)
    say(f"{number_of(answer.blobs_removed, 'blob')} ({size}) {verb}, {answer.blobs_kept:,} kept")


def _worker_state(state: int) -> str:
    from phalanx.v1.cluster_service_pb2 import Worker

    descriptor = Worker.State.DESCRIPTOR.values_by_number.get(state)
    return descriptor.name.removeprefix("STATE_") if descriptor is not None else str(state)


def _counted(counts: dict[str, int] | Counter[str]) -> str:
    return ", ".join(f"{count} {name.lower()}" for name, count in sorted(counts.items()) if count)
