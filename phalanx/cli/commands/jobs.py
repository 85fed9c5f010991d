"""Commands on jobs: submit, train, list, follow, steer and verify."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phalanx.cli.commands.data import PANEL
from phalanx.cli.context import Settings, settings_of
from phalanx.errors import InvalidArgument, NotFound, PhalanxError
from phalanx.texts import number_of

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from phalanx.data.wording import Value
    from phalanx.sdk.cluster import Cluster
    from phalanx.sdk.job import Job
    from phalanx.specs import Document
    from phalanx.v1 import job_pb2

JOB = Annotated[str, typer.Argument(metavar="JOB", help="Id of the job, as `phalanx jobs` shows.")]
FILE = Annotated[
    str, typer.Argument(metavar="FILE", help="Job file in YAML or JSON; - reads standard input.")
]
SETS = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="path=value", help="Change a field: train.batch_size=4096."),
]
PLOT = Annotated[
    Path | None,
    typer.Option(metavar="FILE.png", help="At the end, or at Ctrl-C, write curves and incidents."),
]


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    for command in (submit, train, jobs, show, watch, pause, resume, cancel, retry, delete, verify):
        app.command(rich_help_panel=PANEL)(command)


def submit(
    context: typer.Context,
    file: FILE,
    sets: SETS = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", metavar="", help="Check it and show the plan; submit nothing."),
    ] = False,
    wait: Annotated[
        bool, typer.Option("--wait", metavar="", help="Wait for the end; exit code 1 if it fails.")
    ] = False,
    request_id: Annotated[
        str | None,
        typer.Option(metavar="ID", help="The same id submits the same job only once."),
    ] = None,
) -> None:
    """Submit a job; its id is written to standard output.

    [bold]Examples[/bold]

    phalanx submit job.yaml --set train.batch_size=4096

    JOB=$(phalanx submit job.yaml) && phalanx watch $JOB
    """
    settings = settings_of(context)
    document = read_job(file, sets or [])
    with settings.connect() as cluster:
        if dry_run:
            _show_dry_run(cluster, document, settings)
            return
        job = submit_document(cluster, document, request_id)
        if settings.json and not wait:
            _print_submitted(job)
            return
        if not settings.json:
            print(job.id, flush=True)
            show_plan(job.plan)
        if not wait:
            from phalanx.cli.output import say

            say(f"  next: {settings.command('watch', job.id)}")
            return
        raise typer.Exit(_wait(job, settings))


def train(
    context: typer.Context,
    file: FILE,
    sets: SETS = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(metavar="PATH", help="Add this file under the job's data name first."),
    ] = None,
    target: Annotated[
        str | None, typer.Option(metavar="COL", help="With --data: the column to predict.")
    ] = None,
    test: Annotated[
        str | None, typer.Option(metavar="FRACTION|PATH", help="With --data: the held-out part.")
    ] = None,
    missing: Annotated[
        str, typer.Option(metavar="HOW", help="With --data: error, category or mean.")
    ] = "error",
    workers: Annotated[
        int, typer.Option(metavar="N", min=1, help="Workers, if a cluster must be started.")
    ] = 4,
    state: Annotated[
        Path | None, typer.Option(metavar="DIR", help="State folder, if one must be started.")
    ] = None,
    plot: PLOT = None,
) -> None:
    """Submit a job and follow it; starts a cluster if none runs.

    Uses the cluster that --address or PHALANX_ADDRESS name, or the one that `phalanx up` started.
    Without one it starts one on this machine and stops it at the end; data and models stay in the
    state folder.

    [bold]Example[/bold]

    phalanx train job.yaml --data adult.csv --target income --test 0.2
    """
    from phalanx.cli.commands.local import cluster_for_training
    from phalanx.cli.output import say
    from phalanx.cli.watch import follow
    from phalanx.local.cluster import LocalCluster
    from phalanx.plotting import require_plot

    settings = settings_of(context)
    document = read_job(file, sets or [])
    if plot is not None:
        require_plot(plot)
    with cluster_for_training(settings, workers, state) as cluster:
        if data:
            _add_data(cluster, document, data, target=target, test=test, missing=missing)
        job = submit_document(cluster, document, None)
        if not settings.json:
            say(f"job {job.id}")
            show_plan(job.plan)
        go_on = None
        if isinstance(cluster, LocalCluster):
            go_on = "phalanx up" if state is None else f"phalanx up --state {state}"
        raise typer.Exit(follow(job, settings, plot=plot, go_on=go_on))


def jobs(
    context: typer.Context,
    state: Annotated[
        list[str] | None,
        typer.Option(metavar="S", help="queued, running, paused, succeeded, failed, cancelled."),
    ] = None,
    dead_letters: Annotated[
        bool,
        typer.Option(
            "--dead-letters",
            metavar="",
            help="The shards that failed for good, with their rows.",
        ),
    ] = False,
) -> None:
    """List the jobs, newest first.

    `--dead-letters` lists what made jobs fail: each shard with its rows, attempts, workers and what
    it said. `phalanx show JOB` has the traceback, `phalanx retry JOB` tries again.
    """
    from phalanx.cli.output import print_json_list, print_table
    from phalanx.sdk.values import local_time

    settings = settings_of(context)
    if dead_letters:
        _show_dead_letters(settings, state)
        return
    with settings.connect() as cluster:
        found = cluster.jobs(*(state or []))
    if settings.json:
        print_json_list("jobs", [job.message for job in found], found.incomplete)
        return
    print_table(
        ("JOB", "STATE", "STEP", "LOSS", "CREATED"),
        [
            (
                job.id,
                _state_text(job),
                _steps_text(job.message.progress),
                _loss_text(job.message.progress),
                local_time(job.message.create_time),
            )
            for job in found
        ],
        empty="no jobs; submit one with `phalanx submit job.yaml`",
    )


def _show_dead_letters(settings: Settings, state: list[str] | None) -> None:
    """The failures of failed jobs, each with the job that it belongs to."""
    from phalanx.cli.output import print_json_list, say
    from phalanx.sdk.wire_json import message_to_json

    if state:
        raise InvalidArgument("--dead-letters are of failed jobs; leave --state out")
    with settings.connect() as cluster:
        failed = cluster.jobs("failed")
    found = [(job, failure) for job in failed for failure in job.message.failures]
    if settings.json:
        letters: list[Message | dict[str, object]] = [
            {"job_id": job.id, **message_to_json(failure)} for job, failure in found
        ]
        print_json_list("dead_letters", letters, failed.incomplete)
        return
    for job, failure in found:
        print(f"{job.id}  {failure.code}  {_place_of(failure)}".rstrip())
        print(f"  {failure.message}")
    if found:
        say("\nwith traceback: phalanx show JOB · once mended: phalanx retry JOB")
    else:
        say("no dead letters: no job has failed")


def _place_of(failure: job_pb2.Failure) -> str:
    """Where a leaf failed, how often and on which workers; empty for what is no leaf's failure."""
    if failure.shard < 0 or not failure.attempts:
        return ""
    last = failure.first_row + failure.row_count - 1
    rows = f", rows {failure.first_row:,} to {last:,}" if failure.row_count else ""
    return (
        f"shard {failure.shard}{rows}, step {failure.step}, "
        f"{number_of(failure.attempts, 'attempt')} on {', '.join(failure.worker_ids)}"
    )


def show(context: typer.Context, job_id: JOB) -> None:
    """Show all about a job: state, result, failures, spec."""
    from phalanx.cli.output import print_json

    settings = settings_of(context)
    with settings.connect() as cluster:
        job = cluster.get(job_id)
    if settings.json:
        print_json(job.message)
    else:
        _show_job(job)


def watch(context: typer.Context, job_id: JOB, plot: PLOT = None) -> None:
    """Follow a job live; Ctrl-C leaves it running.

    Shows progress, loss, accuracy and speed, which worker has which shards, and what happens:
    shards that have just moved to another worker are yellow.
    """
    from phalanx.cli.watch import follow

    settings = settings_of(context)
    with settings.connect() as cluster:
        raise typer.Exit(follow(cluster.get(job_id), settings, plot=plot))


def pause(context: typer.Context, job_id: JOB) -> None:
    """Write a checkpoint at the next step and free the workers."""
    _act(context, job_id, lambda job: job.pause())


def resume(context: typer.Context, job_id: JOB) -> None:
    """Go on with a paused job."""
    _act(context, job_id, lambda job: job.resume())


def cancel(
    context: typer.Context,
    job_id: JOB,
    reason: Annotated[str, typer.Option(metavar="TEXT", help="Kept with the job.")] = "",
) -> None:
    """End a job at the next step; it leaves no model."""
    _act(context, job_id, lambda job: job.cancel(reason))


def retry(context: typer.Context, job_id: JOB) -> None:
    """Try a failed job again from its last checkpoint."""
    _act(context, job_id, lambda job: job.retry())


def delete(context: typer.Context, job_id: JOB) -> None:
    """Forget a job that has ended; its model stays."""
    from phalanx.cli.output import print_json, say

    settings = settings_of(context)
    with settings.connect() as cluster:
        cluster.get(job_id).delete()
    if settings.json:
        print_json({})
    else:
        say(f"deleted {job_id}")


def verify(context: typer.Context, job_id: JOB) -> None:
    """Prove what a finished job used, and compute it again here.

    The job's own records tell which contributions were committed, and its sampler which examples
    these had: in every whole epoch each example exactly once, but for those that are named as left
    out. Then the same leaves are summed by the same tree without any cluster, and the SHA-256 of
    the parameters is compared. A set of tasks must have one result of each task.

    Exit code 1 when the hashes differ or the ledger does not balance; 6 when it balances and there
    is nothing to compare the hash with, or the hashes differ on a machine whose numeric fingerprint
    is not that of the job's workers. Equal hashes prove it on any machine.
    """
    from phalanx.cli.errors import Exit
    from phalanx.cli.output import print_json, say
    from phalanx.cli.verdict_view import print_verdict

    settings = settings_of(context)
    with settings.connect() as cluster:
        cluster.get(job_id)
        if not settings.json:
            say(f"verifying {job_id} in this process …")
        outcome = cluster.verify(job_id)
    if settings.json:
        print_json(outcome.to_json())
    else:
        print_verdict(outcome)
    if outcome.wrong:
        raise typer.Exit(Exit.JOB_FAILED)
    raise typer.Exit(Exit.CONFLICT if outcome.not_compared else Exit.DONE)


def read_job(file: str, sets: list[str]) -> Document:
    """Read a job file, or standard input for ``-``."""
    from phalanx.sdk.job_files import parse_document, read_document

    if file != "-":
        return read_document(file, sets=sets)
    text = sys.stdin.read()
    # JSON of an object starts like this; a YAML job file hardly does, and would mean the same.
    is_json = text.lstrip().startswith("{")
    return parse_document(text, "standard input", is_json=is_json, sets=sets)


def submit_document(cluster: Cluster, document: Document, request_id: str | None) -> Job:
    """Submit; violations that the server finds get the lines of the file."""
    try:
        return cluster.submit(document.spec, request_id=request_id)
    except PhalanxError as error:
        raise _with_source(document, error) from None


def show_plan(plan: job_pb2.Plan | None) -> None:
    """Tell what the job is going to do."""
    from phalanx.cli.output import bytes_text, say

    if plan is None:
        return
    if plan.rows_per_leaf:
        parts = [number_of(plan.steps, "step") if plan.steps else "no fixed number of steps"]
        parts += [f"{number_of(plan.rows_per_leaf, 'row')} per leaf"]
        parts += [number_of(plan.evaluations, "evaluation")]
        parts += [number_of(plan.checkpoints, "checkpoint")]
    else:  # tasks have no leaves
        parts = [number_of(plan.steps, "task")]
    parts += [f"{bytes_text(plan.worker_bytes)} per worker"]
    parts += [number_of(plan.eligible_workers, "worker")]
    parts += [f"ε {plan.epsilon:.4g} at the end"] if plan.epsilon else []
    say("  " + " · ".join(parts))
    for warning in plan.warnings:
        say(f"  warning: {warning}")


def _show_dry_run(cluster: Cluster, document: Document, settings: Settings) -> None:
    from phalanx.cli.output import print_json, print_spec, say

    try:
        answer = cluster.plan(document.spec)
    except PhalanxError as error:
        raise _with_source(document, error) from None
    if settings.json:
        print_json(answer)
        return
    say("the job is valid; nothing was submitted")
    show_plan(answer.plan)
    print_spec(answer.job.spec)


def _with_source(document: Document, error: PhalanxError) -> PhalanxError:
    """Name the file and its lines in an error that the server found."""
    document.locate_error(error)
    if error.violations and document.source not in error.message:
        line = error.violations[0].line
        place = document.source if line is None else f"{document.source}:{line}"
        error.message = f"{place}: {error.message}"
    return error


def _print_submitted(job: Job) -> None:
    from phalanx.cli.output import print_json
    from phalanx.sdk.wire_json import message_to_json

    plan = message_to_json(job.plan) if job.plan is not None else None
    print_json({"job": message_to_json(job.message), "plan": plan})


def _wait(job: Job, settings: Settings) -> int:
    from phalanx.cli.errors import Exit
    from phalanx.cli.output import print_json, say
    from phalanx.cli.watch import conclude

    try:
        for _ in job.watch():
            pass
    except KeyboardInterrupt:
        say(f"\nthe job goes on; attach again with: {settings.command('watch', job.id)}")
        return Exit.INTERRUPTED
    if settings.json:
        print_json(job.message)
    return conclude(job, settings)


def _add_data(cluster: Cluster, document: Document, paths: list[Path], **options: Any) -> None:
    """Add the job's data set unless the cluster has one of that name."""
    from phalanx.cli.commands.data import _held_out, say_notes, say_silent
    from phalanx.cli.output import say
    from phalanx.data.wording import spelled

    name = document.spec.data.name.partition("@")[0]
    if not name:
        raise InvalidArgument("the job names no data set: give it data.name, or leave --data out")
    try:
        known = cluster.data.get(name)
    except NotFound:
        test = options["test"]
        chosen = {
            "target": options["target"],
            "test": _held_out("--test", [test] if test is not None else None),
            "missing": options["missing"],
        }
        given = {key: value for key, value in chosen.items() if value is not None}
        with spelled(_flag):
            added = cluster.data.add(name, *paths, on_silence=say_silent, **given)
        say(f"added data set {added.name}@{added.version}")
        say_notes(cluster.data.manifest(f"{added.name}@{added.version}").notes)
    else:
        say(f"data set {known.name}@{known.version} is there already; --data is not read again")


def _flag(option: str, value: Value = "") -> str:
    """Return how an option of the data is given; most of them `phalanx data add` has alone."""
    from phalanx.cli.commands.data import flag

    text = flag(option, value)
    return text if option in ("target", "test", "missing") else f"`phalanx data add … {text}`"


def _act(context: typer.Context, job_id: str, action: Callable[[Job], Job]) -> None:
    from phalanx.cli.output import print_json, say

    settings = settings_of(context)
    with settings.connect() as cluster:
        job = action(cluster.get(job_id))
    if settings.json:
        print_json(job.message)
    else:
        say(f"{job.id} {_state_text(job)}")


def _show_job(job: Job) -> None:
    from phalanx.cli.output import print_fields, print_spec, say
    from phalanx.cli.watch import best_text, show_result
    from phalanx.sdk.values import local_time

    message = job.message
    # A job that succeeded tells it with its result.
    best = job.progress.best if job.result is None else None
    print_fields(
        [
            ("job", job.id),
            ("state", _state_text(job)),
            ("message", message.message),
            ("submitter", message.submitter),
            ("created", local_time(message.create_time)),
            ("started", local_time(message.start_time) if message.HasField("start_time") else ""),
            ("ended", local_time(message.end_time) if message.HasField("end_time") else ""),
            ("step", _steps_text(message.progress)),
            ("checkpoint", message.progress.checkpoint_step or ""),
            ("best so far", "" if best is None else best_text(best)),
            ("spec sha256", message.spec_sha256),
        ]
    )
    show_result(job)
    for failure in message.failures:
        say(f"\nfailure {failure.code}: {failure.message}")
        if place := _place_of(failure):
            say(f"  {place}")
        if failure.traceback:
            say(failure.traceback.rstrip())
    print("\nspec:")
    print_spec(message.spec, indent=2)


def _state_text(job: Job) -> str:
    if job.reason and job.reason != job.state:
        return f"{job.state} ({job.reason})"
    return job.state


def _steps_text(progress: job_pb2.Progress) -> str:
    total = f"/{progress.total_steps:,}" if progress.total_steps else ""
    return f"{progress.step:,}{total}"


def _loss_text(progress: job_pb2.Progress) -> str:
    loss = dict(progress.metrics).get("train/loss")
    return "" if loss is None else f"{loss:.4f}"
