"""Curves of a job as a picture, with what happened on the way."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phalanx.errors import FailedPrecondition, InvalidArgument, NotFound
from phalanx.files import replace_content

if TYPE_CHECKING:
    from phalanx.sdk.job import Job
    from phalanx.sdk.values import Event, MetricPoint

DEATH, RECOVERY = "death", "recovery"
MARKS_MAX = 12
FORMATS = (".png", ".svg", ".pdf")
_DEATHS = ("WORKER_LOST", "AGGREGATOR_LOST", "CONTROL_TOOK_OVER", "STORAGE_UNAVAILABLE")
_RECOVERIES = ("RECOVERED", "STORAGE_RESTORED")
_COLOURS = {DEATH: "#c0392b", RECOVERY: "#1e8449"}
_SERIES_COLOURS = ("#1f4e9c", "#e08a1e", "#7b3fa0", "#2a9d8f")


@dataclass(frozen=True)
class Incident:
    """A mark on the curves: ``kind`` is DEATH or RECOVERY, ``step`` where it happened."""

    kind: str
    step: float
    text: str


def require_matplotlib() -> None:
    """Raise FailedPrecondition when the plotting library is not installed."""
    try:
        import_module("matplotlib")
    except ImportError:
        raise FailedPrecondition(
            "plots need matplotlib, which is not installed; run `pip install 'phalanx[plot]'` "
            "or leave --plot out",
            reason="PLOT_NOT_INSTALLED",
        ) from None


def require_plot(file: Path) -> None:
    """Raise the error that drawing to ``file`` would end with."""
    require_matplotlib()
    if file.suffix.lower() not in FORMATS:
        raise InvalidArgument(f"{file} is no picture; write to one of {', '.join(FORMATS)}")
    if not file.absolute().parent.is_dir():
        raise NotFound(f"there is no folder {file.parent} for {file.name}; make it first")


def plot_job(job: Job, file: Path) -> bool:
    """Fetch metrics and events of a job and draw them to ``file`` (.png, .svg or .pdf).

    Return whether there are any metrics; without them no file is written.
    """
    from phalanx.sdk import methods
    from phalanx.sdk.values import event_value
    from phalanx.v1.cluster_service_pb2 import ListEventsRequest

    points = job.metrics()
    if not points:
        return False
    request = ListEventsRequest(job_id=job.id)
    events = [event_value(item.event) for item in job.stream(methods.LIST_EVENTS, request)]
    title = f"{job.id} · {job.state.lower()}"
    plot_curves(file, title, points, incidents_of(events, points))
    return True


def incidents_of(events: Iterable[Event], points: Sequence[MetricPoint]) -> list[Incident]:
    """Return the deaths and recoveries among ``events``.

    An event that names no step is placed by its time between the steps' times.
    """
    clock = sorted({(point.time.timestamp(), point.step) for point in points})
    found = []
    for event in events:
        kind = DEATH if event.type in _DEATHS else RECOVERY if event.type in _RECOVERIES else None
        if kind is not None:
            step = event.step if event.step is not None else _step_at(event.time.timestamp(), clock)
            found.append(Incident(kind, step, _incident_text(event)))
    return found


def plot_curves(
    file: Path, title: str, points: Sequence[MetricPoint], incidents: Sequence[Incident]
) -> None:
    """Draw losses above and the other metrics below, by step, and write them to ``file``.

    Incidents are vertical lines with numbers; what the numbers mean stands below the curves, so
    that texts never lie on each other or on a curve. The file appears only when it is complete.
    Raises FailedPrecondition without matplotlib.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    losses, others = _series(points)
    shown = list(incidents[:MARKS_MAX])
    panels = [panel for panel in (losses, others) if panel] or [{}]
    notes = _notes(shown, len(incidents) - len(shown))
    note_height = 0.19 * len(notes)
    figure = Figure(figsize=(9, 2.0 + 2.3 * len(panels) + note_height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12)
    grid = figure.add_gridspec(
        len(panels) + (1 if notes else 0),
        1,
        height_ratios=[*([2.6] * len(panels)), *([note_height] if notes else [])],
    )
    first: Any = None
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(grid[index], sharex=first)
        first = first or axes
        _draw_panel(axes, panel)
        _draw_marks(axes, shown, with_numbers=index == 0)
        if index == len(panels) - 1:
            axes.set_xlabel("step")
        else:
            axes.tick_params(labelbottom=False)
    if notes:
        _draw_notes(figure.add_subplot(grid[len(panels)]), notes)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=130, format=file.suffix.lower().removeprefix("."))
    replace_content(file, picture.getvalue())


def _series(
    points: Sequence[MetricPoint],
) -> tuple[dict[str, list[tuple[int, float]]], dict[str, list[tuple[int, float]]]]:
    """Split the points by metric into losses and the others, each ordered by step."""
    by_name: dict[str, dict[int, float]] = {}
    for point in points:
        by_name.setdefault(point.name, {})[point.step] = point.value
    losses: dict[str, list[tuple[int, float]]] = {}
    others: dict[str, list[tuple[int, float]]] = {}
    # What is measured at each step lies beneath what is measured now and then.
    for name in sorted(by_name, key=lambda name: (not name.startswith("train/"), name)):
        target = losses if name.endswith("/loss") else others
        target[name] = sorted(by_name[name].items())
    return losses, others


def _draw_panel(axes: Any, series: Mapping[str, list[tuple[int, float]]]) -> None:
    kinds = {name.rpartition("/")[2] for name in series}
    for index, (name, values) in enumerate(series.items()):
        steps, numbers = zip(*values, strict=True)
        axes.plot(
            steps,
            numbers,
            label=name,
            color=_SERIES_COLOURS[index % len(_SERIES_COLOURS)],
            linewidth=1.6,
            # A few evaluations are points, hundreds of steps are a line.
            marker="o" if len(values) <= 40 else None,
            markersize=3.5,
        )
    axes.set_ylabel(kinds.pop() if len(kinds) == 1 else "metrics")
    axes.grid(visible=True, alpha=0.25)
    axes.margins(x=0.02)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if series:
        # Beside the curves: within them there is no place that is always free.
        axes.legend(loc="upper left", bbox_to_anchor=(1.005, 1.0), frameon=False, fontsize=9)


def _draw_marks(axes: Any, incidents: Sequence[Incident], *, with_numbers: bool) -> None:
    """Draw the lines; numbers of marks that lie close together stand in rows above each other."""
    low, high = axes.get_xlim()
    close = (high - low) * 0.025
    row_ends: list[float] = []
    for number, incident in enumerate(incidents, start=1):
        style = "--" if incident.kind == DEATH else ":"
        colour = _COLOURS[incident.kind]
        axes.axvline(incident.step, color=colour, linestyle=style, linewidth=1.2, alpha=0.9)
        if not with_numbers:
            continue
        row = next((r for r, end in enumerate(row_ends) if incident.step - end > close), None)
        if row is None:
            row_ends.append(incident.step)
            row = len(row_ends) - 1
        row_ends[row] = incident.step
        axes.annotate(
            str(number),
            xy=(incident.step, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 4 + 12 * row),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color="white",
            bbox={"boxstyle": "circle,pad=0.2", "facecolor": colour, "edgecolor": "none"},
        )
    axes.set_xlim(low, high)


def _notes(incidents: Sequence[Incident], left_out: int) -> list[tuple[str, str]]:
    lines = [
        (_COLOURS[incident.kind], f"{number}   step {incident.step:.0f}   {incident.text}")
        for number, incident in enumerate(incidents, start=1)
    ]
    if left_out > 0:
        lines.append(("#555555", f"…   and {left_out} more; `phalanx events` lists them all"))
    return lines


def _draw_notes(axes: Any, notes: Sequence[tuple[str, str]]) -> None:
    axes.axis("off")
    for index, (colour, text) in enumerate(notes):
        axes.text(
            0.0,
            1.0 - (index + 0.5) / len(notes),
            text,
            transform=axes.transAxes,
            fontsize=8.5,
            color=colour,
            va="center",
        )


def _incident_text(event: Event) -> str:
    what = event.type.replace("_", " ").lower()
    message = event.message if len(event.message) <= 90 else event.message[:89] + "…"
    if event.worker_id and event.worker_id not in message:
        what += f" {event.worker_id}"
    return (
        f"{event.time:%H:%M:%S}.{event.time.microsecond // 1000:03d}   {what}   {message}".rstrip()
    )


def _step_at(time_s: float, clock: Sequence[tuple[float, int]]) -> float:
    """Return the step at a time, between the two points around it."""
    before = [item for item in clock if item[0] <= time_s]
    after = [item for item in clock if item[0] > time_s]
    if not before:
        return float(after[0][1]) if after else 0.0
    if not after:
        return float(before[-1][1])
    (time_0, step_0), (time_1, step_1) = before[-1], after[0]
    return step_0 + (step_1 - step_0) * (time_s - time_0) / (time_1 - time_0)
