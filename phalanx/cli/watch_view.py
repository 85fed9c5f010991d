"""How a watched job looks: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from phalanx.cli.watch_state import WatchState, WorkerRow, ranges_text
from phalanx.sdk.values import Event
from phalanx.texts import number_of
from phalanx.v1 import job_pb2

CELLS_MAX = 32
SPARK = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 40
_STATE_STYLES = {
    "QUEUED": "yellow",
    "RUNNING": "green",
    "PAUSED": "yellow",
    "SUCCEEDED": "bold green",
    "FAILED": "bold red",
    "CANCELLED": "red",
}
_BAD_EVENTS = ("LOST", "FAILED", "CORRUPT", "UNAVAILABLE", "REFUSED", "POISON", "QUARANTINED")
_GOOD_EVENTS = ("RECOVERED", "RESTORED", "SUCCEEDED", "JOINED", "REGISTERED")


def render(state: WatchState, now_s: float, width: int) -> RenderableType:
    """Return the whole display; it fits ``width`` ≥ 60 columns."""
    parts: list[RenderableType] = [_headline(state), _bar(state, width)]
    parts += [_metrics(state), _speed(state)]
    if state.progress.HasField("best"):
        parts.append(_best(state.progress.best))
    if state.workers:
        parts.append(_workers(state, now_s))
    if state.events:
        parts.append(Text())
        parts += [_event_line(event, width) for event in state.events]
    return Group(*parts)


def _headline(state: WatchState) -> Text:
    line = Text(no_wrap=True, overflow="ellipsis")
    line.append(state.job.id, style="bold")
    line.append("  ")
    line.append(state.state, style=_STATE_STYLES.get(state.state, ""))
    reason = state.job.reason
    if reason and (state.state not in ("RUNNING", "SUCCEEDED") or reason.startswith("WAITING")):
        line.append(f"  {reason}", style="yellow")
    data = state.job.spec.data.name
    if state.is_task_set:
        line.append(f"  {number_of(state.progress.total_steps, 'task')}", style="dim")
    elif data:
        line.append(f"  {data}, {number_of(state.shard_count, 'shard')}", style="dim")
    return line


def _bar(state: WatchState, width: int) -> RenderableType:
    progress = state.progress
    total = progress.total_steps
    done_of = f"{progress.step:,}" + (f"/{total:,}" if total else "")
    if state.is_task_set:
        shown = f"tasks {done_of}"
    else:
        shown = f"step {done_of}  epoch {progress.epoch:.2f}"
    text = Text(shown, no_wrap=True)
    if state.state == "SUCCEEDED":
        # A stop rule may end a job before its last step; the bar is full all the same.
        total, done = 1, 1
    else:
        done = progress.step
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_row(
        ProgressBar(
            total=total or None,
            completed=min(done, total) if total else 0,
            width=max(10, min(40, width - len(text) - 4)),
            pulse=not total and state.state == "RUNNING",
        ),
        text,
    )
    return grid


def _metrics(state: WatchState) -> Text:
    metrics = dict(state.progress.metrics)
    line = Text(no_wrap=True, overflow="ellipsis")
    for name in _metric_order(metrics):
        line.append(f"{name} ", style="dim")
        shown = f"{metrics[name]:,.0f}" if state.is_task_set else f"{metrics[name]:.4f}"
        line.append(f"{shown}  ")
    return line


def _best(best: job_pb2.BestEvaluation) -> Text:
    line = Text(no_wrap=True, overflow="ellipsis")
    line.append(f"best {best.metric} ", style="dim")
    line.append(f"{best.value:.4f} at step {best.step:,}")
    return line


def _speed(state: WatchState) -> Text:
    line = Text(no_wrap=True, overflow="ellipsis")
    line.append(f"{_unit(state)}/s ", style="dim")
    line.append(f"{state.progress.examples_per_second:,.0f}  ")
    curve = sparkline([loss for _, loss in state.losses], SPARK_WIDTH)
    if curve:
        line.append("loss ", style="dim")
        line.append(curve, style="cyan")
    return line


def _unit(state: WatchState) -> str:
    return "tasks" if state.is_task_set else "examples"


def _metric_order(metrics: dict[str, float]) -> list[str]:
    first = ["train/loss", "test/loss", "test/accuracy", "validation/accuracy"]
    known = [name for name in first if name in metrics]
    return known + sorted(set(metrics) - set(known))[: max(0, 3 - len(known))]


def _workers(state: WatchState, now_s: float) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("worker", no_wrap=True, overflow="ellipsis", max_width=16)
    if not state.is_task_set:
        cells = min(state.shard_count, CELLS_MAX)
        table.add_column(f"shards 0-{state.shard_count - 1}", no_wrap=True, min_width=cells)
    table.add_column("", no_wrap=True, overflow="ellipsis", max_width=14)
    table.add_column("tasks/s" if state.is_task_set else "ex/s", justify="right", no_wrap=True)
    for worker_id in sorted(state.workers, key=_natural):
        row = state.workers[worker_id]
        gone = row.note in ("lost", "left") and not row.shards
        note = Text(ranges_text(row.shards) or row.note, style="red" if gone else "dim")
        name = Text(worker_id, style="red strike" if gone else "")
        works = bool(row.shards) or (state.is_task_set and not gone)
        rate = f"{row.examples_per_second:,.0f}" if works else ""
        cells_of = [] if state.is_task_set else [shard_cells(state, row, now_s)]
        table.add_row(name, *cells_of, note, rate)
    return table


def shard_cells(state: WatchState, row: WorkerRow, now_s: float) -> Text:
    """Return one cell per shard (or per group of shards when there are many).

    Full where the worker has the shards, yellow where they came from another worker a moment ago.
    """
    cells = min(state.shard_count, CELLS_MAX)
    text = Text()
    for cell in range(cells):
        first = cell * state.shard_count // cells
        stop = (cell + 1) * state.shard_count // cells
        mine = [shard for shard in range(first, stop) if shard in row.shards]
        if not mine:
            text.append("·", style="dim")
            continue
        moved = any(state.moved(shard, now_s) for shard in mine)
        text.append("█" if len(mine) == stop - first else "▒", style="yellow" if moved else "blue")
    return text


def _event_line(event: Event, width: int) -> Text:
    style = ""
    if any(word in event.type for word in _BAD_EVENTS):
        style = "red"
    elif any(word in event.type for word in _GOOD_EVENTS):
        style = "green"
    line = Text(no_wrap=True, overflow="ellipsis")
    line.append(f"{event.time:%H:%M:%S}.{event.time.microsecond // 1000:03d} ", style="dim")
    line.append(event.type, style=style)
    line.append(f" {_without_repetition(event)}")
    line.truncate(width, overflow="ellipsis")
    return line


def event_text(event: Event) -> str:
    """Return one event as a plain line."""
    place = "".join(
        f" {name}={value}"
        for name, value in (("step", event.step), ("shard", event.shard))
        if value is not None
    )
    return f"{event.time:%H:%M:%S.%f}"[:-3] + f" {event.type}{place} {_without_repetition(event)}"


def _without_repetition(event: Event) -> str:
    """Return the message, with the worker's name in front unless the message has it."""
    if event.worker_id and event.worker_id not in event.message:
        return f"{event.worker_id} {event.message}".strip()
    return event.message


def progress_text(state: WatchState) -> str:
    """Return the progress as a plain line."""
    progress = state.progress
    total = f"/{progress.total_steps}" if progress.total_steps else ""
    metrics = dict(progress.metrics)
    # Those of a set of tasks are counts.
    digits = 0 if state.is_task_set else 4
    shown = " ".join(f"{name}={metrics[name]:.{digits}f}" for name in _metric_order(metrics))
    if progress.HasField("best"):
        best = progress.best
        shown += f" best {best.metric}={best.value:.4f}@{best.step}"
    per_second = f"{_unit(state)}/s={progress.examples_per_second:.0f}"
    if state.is_task_set:
        return f"tasks {progress.step}{total} {shown} {per_second}"
    owners = " ".join(
        f"{row.worker_id}:{ranges_text(row.shards).replace(' ', ',')}"
        for row in state.workers.values()
        if row.shards
    )
    return (
        f"step {progress.step}{total} epoch {progress.epoch:.2f} {shown} {per_second} {owners}"
    ).rstrip()


def sparkline(values: list[float], width: int) -> str:
    """Return the last course of a curve in one line of text."""
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < 2:
        return ""
    if len(finite) > width:
        # The whole course, thinned out; the newest value is always there.
        step = (len(finite) - 1) / (width - 1)
        finite = [finite[round(index * step)] for index in range(width)]
    low, high = min(finite), max(finite)
    scale = (len(SPARK) - 1) / (high - low) if high > low else 0.0
    return "".join(SPARK[round((value - low) * scale)] for value in finite)


def _natural(worker_id: str) -> tuple[str, int]:
    """Sort worker-10 after worker-9."""
    stem, _, number = worker_id.rpartition("-")
    return (stem, int(number)) if number.isdigit() else (worker_id, 0)
