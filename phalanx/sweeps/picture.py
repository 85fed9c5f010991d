"""The scores of a sweep as a picture: each configuration with its mean and the spread of its folds.

It is for people, and not of the same bytes everywhere: other fonts and versions draw otherwise.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from phalanx.errors import FailedPrecondition
from phalanx.plotting import require_matplotlib

SHOWN_MAX = 40
"""Of more configurations the best are shown."""


def picture_of(name: str, table: Mapping[str, Any]) -> bytes:
    """Return a PNG; empty where matplotlib is not installed."""
    try:
        require_matplotlib()
    except FailedPrecondition:
        return b""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [each for each in table["configurations"] if each["mean"] is not None]
    rows = sorted(rows, key=lambda each: (each["rank"], each["configuration"]))[:SHOWN_MAX]
    rows.reverse()
    figure = Figure(figsize=(8, 1.6 + 0.26 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = range(len(rows))
    axes.errorbar(
        [each["mean"] for each in rows],
        places,
        xerr=[each["std"] for each in rows],
        fmt="o",
        color="#1f4e9c",
        ecolor="#9bb3d8",
        capsize=2,
    )
    axes.set_yticks(list(places), [_label(each) for each in rows], fontsize=8)
    axes.set_xlabel(f"{table['metric']}, mean and deviation of {table['folds']} folds")
    axes.set_title(name, fontsize=11)
    axes.grid(visible=True, axis="x", alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format="png", metadata={"Software": None})
    return picture.getvalue()


def _label(row: Mapping[str, Any]) -> str:
    text = ", ".join(f"{path} {value}" for path, value in row["values"].items())
    return text if len(text) <= 60 else f"{text[:59]}…"
