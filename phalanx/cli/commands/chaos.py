"""The command that harms a cluster on purpose and says what it cost."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from phalanx.cli.commands.cluster import PANEL, STATE
from phalanx.cli.context import Settings, settings_of
from phalanx.cli.errors import Exit

if TYPE_CHECKING:
    from phalanx.chaos.report import Injury, Report
    from phalanx.chaos.run import Chaos
    from phalanx.sdk.cluster import Cluster
    from phalanx.sdk.job import Job


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command(rich_help_panel=PANEL)(chaos)


def chaos(
    context: typer.Context,
    fault: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A kind of fault; repeat it for a mix, the same one twice for more of it. "
            "Default: half kill-worker, a quarter pause-worker, an eighth slow-worker, "
            "an eighth kill-control or kill-aggregator. --list-faults shows all.",
        ),
    ] = None,
    every: Annotated[str, typer.Option(metavar="TIME", help="Time between faults.")] = "5s",
    duration: Annotated[str, typer.Option("--for", metavar="TIME", help="How long.")] = "60s",
    baseline: Annotated[
        str,
        typer.Option(metavar="TIME", help="Undisturbed time before and after, to compare with."),
    ] = "15s",
    job: Annotated[
        str, typer.Option(metavar="JOB", help="Job to watch. Default: the newest that runs.")
    ] = "",
    seed: Annotated[
        int, typer.Option(metavar="N", help="The same seed gives the same schedule.")
    ] = 0,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            metavar="",
            help="Wait for the job's end, compute it again here, compare the bits.",
        ),
    ] = False,
    state: STATE = None,
    list_faults: Annotated[
        bool, typer.Option("--list-faults", metavar="", help="Show the kinds of fault and end.")
    ] = False,
) -> None:
    """Harm the cluster on purpose and see what it costs.

    Start a job, then this command. It measures the job undisturbed, disturbs it,
    and shows goodput (steps per second under faults over those without),
    recovery times, and what was lost or counted twice: nothing, unless
    something is broken.

    It harms processes of this machine only. What `phalanx up` runs is started
    again by itself; elsewhere a killed process stays dead unless something
    restarts it. Ctrl-C ends it; paused processes are continued in any case.

    Exit code 1 when the job failed or did not go on after a fault, when control
    stayed away, when something was lost or doubled, and when the bits differ;
    6 when no process was harmed that the job needed, which proves nothing.

    [bold]Examples[/bold]

    phalanx chaos --every 5s --for 60s

    phalanx chaos --fault kill-worker --fault kill-control --for 5m --verify
    """
    from phalanx.chaos.run import Chaos, ChaosOptions
    from phalanx.chaos.schedule import faults_named
    from phalanx.chaos.victims import victims_of
    from phalanx.cli.output import say
    from phalanx.errors import InvalidArgument
    from phalanx.sdk.discovery import default_state_dir

    settings = settings_of(context)
    if list_faults:
        _list_faults(settings)
        return
    options = ChaosOptions(
        mix=faults_named(fault or []),
        every_s=_seconds("--every", every, at_least=0.1),
        duration_s=_seconds("--for", duration, at_least=0.1),
        baseline_s=_seconds("--baseline", baseline, at_least=0.0),
        seed=seed,
    )
    if options.every_s > options.duration_s:
        raise InvalidArgument(
            f"--every {every} is longer than --for {duration}: no fault would happen",
            reason="USAGE",
        )
    with settings.connect() as cluster:
        watched = _job_to_watch(cluster, job)
        victims = victims_of(cluster, (state or default_state_dir()).absolute())
        if not fault:
            # What cannot be reached is only an error where it was asked for.
            within_reach = [each for each in options.mix if each.role in victims.roles]
            options = replace(options, mix=within_reach)
        run = Chaos(
            cluster, watched, victims, options, tell=(lambda _: None) if settings.json else say
        )
        report: Report | None = None
        try:
            run.run()
            if verify:
                report = _verified(cluster, watched, run, settings)
        except KeyboardInterrupt:
            if run.began:
                _show(run.report(), settings)
            raise
        report = report or run.report()
    _show(report, settings)
    raise typer.Exit(_exit_of(report))


def _exit_of(report: Report) -> Exit:
    if not report.healthy:
        return Exit.JOB_FAILED
    return Exit.DONE if report.harmful else Exit.CONFLICT


def _job_to_watch(cluster: Cluster, job_id: str) -> Job:
    from phalanx.errors import FailedPrecondition

    if job_id:
        return cluster.get(job_id)
    running = cluster.jobs("RUNNING")
    if not running:
        raise FailedPrecondition(
            "no job runs that could be disturbed; start one with `phalanx submit job.yaml`",
            reason="NO_JOB_RUNS",
        )
    return running[0]


def _verified(cluster: Cluster, job: Job, run: Chaos, settings: Settings) -> Report:
    from phalanx.cli.output import say
    from phalanx.cli.verdict_view import problems_of

    so_far = run.report()
    if so_far.not_recovered or not so_far.control_answered:
        # Its end may never come.
        return so_far
    if not settings.json:
        say(f"waiting for the end of {job.id}, to compute it again …")
    job.wait()
    verdict = cluster.verify(job)
    found = False if verdict.wrong else verdict.equal or None
    report = run.report(bit_identical=found)
    notes = [f"the ledger does not balance: {each}" for each in problems_of(verdict)]
    if verdict.not_compared:
        notes.append(f"bits were not compared: {verdict.not_compared}")
    return replace(report, notes=(*report.notes, *notes))


def _seconds(option: str, text: str, *, at_least: float) -> float:
    from phalanx.errors import InvalidArgument
    from phalanx.specs.scalars import WrongValue, parse_duration_nanos

    try:
        seconds = parse_duration_nanos(text) / 1e9
    except WrongValue as wrong:
        raise InvalidArgument(f"{option}: {wrong}", reason="USAGE") from None
    if seconds < at_least:
        raise InvalidArgument(f"{option}: {text} is too short", reason="USAGE")
    return seconds


def _list_faults(settings: Settings) -> None:
    from phalanx.chaos.schedule import FAULTS
    from phalanx.cli.output import print_json, print_table

    total = sum(fault.weight for fault in FAULTS.values())
    if settings.json:
        shown = [
            {"name": fault.name, "meaning": fault.meaning, "share": fault.weight / total}
            for fault in FAULTS.values()
        ]
        print_json({"faults": shown, "next_page_token": ""})
        return
    print_table(
        ("FAULT", "WHAT HAPPENS", "DEFAULT MIX"),
        [
            (fault.name, fault.meaning, f"{fault.weight}/{total}" if fault.weight else "")
            for fault in FAULTS.values()
        ],
        empty="",
    )


def _show(report: Report, settings: Settings) -> None:
    from phalanx.cli.output import print_fields, print_json, print_table, say

    if settings.json:
        print_json(report.to_json())
        return
    print_table(
        ("AT", "FAULT", "ON", "RECOVERY"),
        [
            (f"{each.at_s:.1f} s", each.fault, each.victim, _recovery(each))
            for each in report.injuries
        ],
        empty="no fault was carried out",
    )
    print()
    counted = report.counters
    print_fields(
        [
            ("job", f"{report.job_id}, {report.state}"),
            (
                "faults",
                f"{len(report.injuries)} in {report.disturbed_s:.0f} s{_without_effect(report)}",
            ),
            ("goodput", "" if report.goodput is None else f"{100 * report.goodput:.1f} %"),
            ("steps per second", _number(report.steps_per_s, "")),
            ("  undisturbed", _number(report.undisturbed_steps_per_s, "")),
            ("recovery p50", _number(report.recovery_p50_s, " s beyond the usual time of a step")),
            ("recovery p99", _number(report.recovery_p99_s, " s")),
            ("not recovered", _not_recovered(report)),
            ("longest gap", _number(report.longest_gap_s, " s between two commits")),
            ("  usual gap", _number(report.usual_gap_s, " s")),
            ("examples lost", _count(counted.examples_lost)),
            ("examples doubled", _count(counted.examples_doubled)),
            ("steps replayed", f"{counted.steps_replayed:,} after the loss of an aggregator"),
            ("workers lost", f"{counted.workers_lost:,}, seen by the cluster"),
            ("parameters", report.parameters_sha256),
            ("bits", _BITS[report.bit_identical]),
        ]
    )
    for note in report.notes:
        say(note)
    if not report.harmful:
        say("no process was harmed that the job needed: this says nothing of what faults cost")


_BITS = {True: "equal to the undisturbed computation", False: "DIFFERENT", None: ""}


def _without_effect(report: Report) -> str:
    idle = len(report.injuries) - report.harmful
    text = f", {idle} where the job had nothing" if idle else ""
    return text + (f", {report.skipped} skipped: nobody was there" if report.skipped else "")


def _recovery(injury: Injury) -> str:
    if injury.idle:
        return "not needed by the job"
    return f"{injury.recovery_s:.2f} s" if injury.recovered else "NOT RECOVERED"


def _not_recovered(report: Report) -> str:
    count = report.not_recovered
    return f"{count} of the faults; the times are those until the end" if count else ""


def _number(value: float | None, unit: str) -> str:
    return "" if value is None else f"{value:.3g}{unit}"


def _count(value: int | None) -> str:
    return "not known before the job has ended" if value is None else f"{value:,}"
