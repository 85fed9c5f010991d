"""Following a job to its end, on a terminal or in a log."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

from phalanx.cli.context import Settings
from phalanx.cli.errors import Exit, file_error
from phalanx.cli.output import console, print_fields, print_json, say
from phalanx.cli.watch_state import WatchState
from phalanx.errors import PhalanxError
from phalanx.sdk.job import Job
from phalanx.sdk.values import BestEvaluation, event_value
from phalanx.tasks import runs_tasks
from phalanx.texts import number_of

FRAMES_PER_S = 8
PLAIN_EVERY_S = 2.0


def follow(
    job: Job, settings: Settings, *, plot: Path | None = None, go_on: str | None = None
) -> int:
    """Show a job until it has ended; return the exit code.

    Ctrl-C leaves the job running, says how to attach again and writes to ``plot`` what there is so
    far; another one ends that, too. ``go_on`` is the command that goes on with the job where its
    cluster ends with this program.
    """
    if plot is not None:
        from phalanx.plotting import require_plot

        # Told now rather than after an hour of training.
        require_plot(plot)
    try:
        _show(job, settings)
    except KeyboardInterrupt:
        _say_how_to_return(job, settings, go_on)
        if plot is not None:
            _plot_so_far(job, plot)
        return Exit.INTERRUPTED
    if plot is not None:
        _plot(job, plot)
    return conclude(job, settings)


def _show(job: Job, settings: Settings) -> None:
    if settings.json:
        for item in job.watch_messages():
            print_json(item)
    elif sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
        _follow_live(job)
    else:
        _follow_plain(job)


def _say_how_to_return(job: Job, settings: Settings, go_on: str | None) -> None:
    if go_on is not None:
        say("\nthe job stops with its cluster; from its last checkpoint it goes on")
        say(f"when the cluster is there again:       {go_on}")
        return
    say(f"\nthe job goes on; attach again with: {settings.command('watch', job.id)}")
    say(f"or end it with:                     {settings.command('cancel', job.id)}")


def _plot_so_far(job: Job, plot: Path) -> None:
    """Write the curves of a job that may go on; say why where they are not written."""
    say("writing the curves so far; Ctrl-C leaves without them")
    try:
        _plot(job, plot)
    except KeyboardInterrupt:
        say(f"\n{plot} is not written")
    except PhalanxError as error:
        say(f"{plot} is not written: {error}")
    except OSError as error:
        say(f"{plot} is not written: {file_error(error)}")


def _plot(job: Job, plot: Path) -> None:
    from phalanx.plotting import plot_job

    if plot_job(job, plot):
        say(f"curves written to {plot}")
    else:
        say(f"there are no curves, as nothing has been measured; {plot} is not written")


def conclude(job: Job, settings: Settings) -> int:
    """Tell how an ended job ended; return the exit code. Raises JobFailed."""
    if not settings.json and job.failures:
        show_failures(job)
    if job.state in ("FAILED", "CANCELLED"):
        job.raise_if_failed()
    if not settings.json:
        show_result(job)
    return Exit.DONE


def show_result(job: Job) -> None:
    """Write what a job that succeeded has left."""
    result = job.result
    if result is None:
        return
    print_fields(
        [
            ("model", result.model),
            *((name, f"{value:.5g}") for name, value in sorted(result.metrics.items())),
            ("tasks" if runs_tasks(job.message.spec) else "steps", result.steps),
            ("best", "" if result.best is None else best_text(result.best)),
            ("files", ", ".join(file.name for file in result.files)),
            ("sha256", result.parameters_sha256),
            ("bit-identical", result.bit_identical),
        ]
    )
    if result.examples_lost or result.examples_doubled:
        lost = number_of(result.examples_lost, "example")
        say(f"warning: {lost} lost, {result.examples_doubled} doubled")


def best_text(best: BestEvaluation) -> str:
    """Return which evaluation is kept."""
    return f"step {best.step:,}, by {best.metric} {best.value:.5g}"


def show_failures(job: Job) -> None:
    """Write the traceback of the first failure; the rest is in `phalanx show`."""
    for failure in job.failures[:1]:
        if failure.traceback:
            say(failure.traceback.rstrip())
    if len(job.failures) > 1:
        say(f"{number_of(len(job.failures) - 1, 'more failure')}: phalanx show {job.id}")


def _follow_plain(job: Job) -> None:
    from phalanx.cli.watch_view import event_text, progress_text

    state = WatchState(job.message)
    shown_at_s = 0.0
    for item in job.watch_messages():
        now_s = time.monotonic()
        before = state.state
        state.feed(item, now_s)
        kind = item.WhichOneof("update")
        if kind == "event":
            print(event_text(event_value(item.event)), flush=True)
        elif kind == "job" and state.state != before:
            print(f"{job.id} {state.state} {job.reason}".rstrip(), flush=True)
        elif kind == "progress" and now_s - shown_at_s >= PLAIN_EVERY_S:
            shown_at_s = now_s
            print(progress_text(state), flush=True)
    print(progress_text(state), flush=True)


def _follow_live(job: Job) -> None:
    from rich.live import Live

    from phalanx.cli.watch_view import render

    screen = console()
    state = WatchState(job.message)
    lock = threading.Lock()

    class Frame:
        """Drawn anew for each frame, so that marks fade while nothing arrives."""

        def __rich__(self) -> object:
            with lock:
                return render(state, time.monotonic(), screen.width)

    with Live(Frame(), console=screen, refresh_per_second=FRAMES_PER_S):  # type: ignore[arg-type]
        for item in job.watch_messages():
            with lock:
                state.feed(item, time.monotonic())
