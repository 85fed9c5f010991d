"""What a benchmark returns, and how the results are shown and stored."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.reliability.rows import Row


@dataclass(frozen=True)
class Measurement:
    """One figure of the benchmark table.

    Attributes:
        name: stable name, as in the documentation.
        value: the figure itself, in ``unit``.
        unit: ``steps/s``, ``s``, ``MiB``, ``ratio`` …
        baseline: what it is compared with, in the same unit; None for none.
        ratio: value ÷ baseline, or the figure itself where it is a ratio.
        reach: the bound that the project sets itself, in words.
        reached: whether this run is inside the bound; None where there is none.
        command: the command that makes this figure.
    """

    name: str
    value: float
    unit: str
    baseline: float | None
    ratio: float | None
    reach: str
    reached: bool | None
    command: str
    note: str = ""


def print_table(measurements: Sequence[Measurement]) -> None:
    """Prints the measurements as a table that fits 80 columns."""
    print(f"{'name':31} {'value':>10} {'unit':8} {'baseline':>10}  {'reach':>8}  ok")
    for m in measurements:
        baseline = "" if m.baseline is None else f"{m.baseline:.4g}"
        verdict = {True: "yes", False: "NO", None: "-"}[m.reached]
        print(f"{m.name:31} {m.value:>10.4g} {m.unit:8} {baseline:>10}  {m.reach:>8}  {verdict}")
        if m.note:
            print(f"    {m.note}")


def write_json(measurements: Sequence[Measurement] | Sequence[Row], path: Path) -> None:
    """Writes the figures as a JSON list, keeping those of other names in the file."""
    kept: list[dict[str, object]] = []
    names = {m.name for m in measurements}
    if path.exists():
        kept = [row for row in json.loads(path.read_text()) if row["name"] not in names]
    rows = sorted([*kept, *(asdict(m) for m in measurements)], key=lambda row: str(row["name"]))
    path.write_text(json.dumps(rows, indent=2) + "\n")
