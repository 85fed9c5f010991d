"""One figure on reliability, and the table of all of them in the documentation."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.checkout import UNKNOWN, measured_at

BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"
_VERDICTS = {True: "yes", False: "no", None: "-"}


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        name: stable name, unique among all rows.
        what: what was measured, in a few words.
        value: the figure itself, in ``unit``.
        unit: ``s``, ``%``, ``steps/s`` …
        reach: the bound that the project sets itself (``<= 0.3``); empty for a figure without one.
        reached: whether this run is inside the bound; None where there is none.
        trials: how many times it was tried; the value is the worst of them unless ``what`` says
            otherwise.
        command: the command that makes this figure.
        note: how it came out in more detail, for people.
        quick: whether the run was a short one, which tries less often than it should.
        commit: what was measured: the short hash of the commit, with a ``+`` if files had been
            changed since; ``unknown`` outside a checkout.
    """

    name: str
    what: str
    value: float
    unit: str
    reach: str
    reached: bool | None
    trials: int
    command: str
    note: str = ""
    quick: bool = False
    commit: str = UNKNOWN


@dataclass(frozen=True)
class Rows:
    """Makes the rows of one run of one group."""

    command: str
    quick: bool

    def at_most(
        self, name: str, what: str, value: float, unit: str, bound: float, *, trials: int, note: str
    ) -> Row:
        """A figure with an upper bound."""
        return self._row(name, what, value, unit, f"<= {bound:g}", value <= bound, trials, note)

    def at_least(
        self, name: str, what: str, value: float, unit: str, bound: float, *, trials: int, note: str
    ) -> Row:
        """A figure with a lower bound."""
        return self._row(name, what, value, unit, f">= {bound:,g}", value >= bound, trials, note)

    def largest(
        self, name: str, what: str, values: Sequence[float], unit: str, bound: float, note: str = ""
    ) -> Row:
        """The largest of some values, one from each trial, with an upper bound."""
        middle = f"largest; median {statistics.median(values):.2f} {unit}"
        note = f"{middle}; {note}" if note else middle
        return self.at_most(name, what, max(values), unit, bound, trials=len(values), note=note)

    def none(
        self,
        name: str,
        what: str,
        count: int,
        *,
        trials: int,
        least: int = 1,
        unit: str = "",
        note: str = "",
    ) -> Row:
        """A count of what must not happen; with fewer than the least trials nothing was shown."""
        reach = "0" if least == 1 else f"0 in >= {least:,}"
        reached = count == 0 and trials >= least
        return self._row(name, what, count, unit, reach, reached, trials, note)

    def all_of(
        self, name: str, what: str, count: int, unit: str, *, trials: int, note: str = ""
    ) -> Row:
        """A count of what must happen in every trial."""
        reach = f"{trials:,} of {trials:,}"
        return self._row(name, what, count, unit, reach, count == trials, trials, note)

    def _row(
        self,
        name: str,
        what: str,
        value: float,
        unit: str,
        reach: str,
        reached: bool,
        trials: int,
        note: str,
    ) -> Row:
        return Row(
            name,
            what,
            value,
            unit,
            reach,
            reached,
            trials,
            self.command,
            note,
            self.quick,
            measured_at(),
        )


def print_rows(rows: Sequence[Row]) -> None:
    """Prints the rows as a table that fits 80 columns."""
    print(f"{'name':38} {'value':>10} {'unit':8} {'reach':>10} {'trials':>6}  ok")
    for row in rows:
        print(
            f"{row.name:38} {row.value:>10.4g} {row.unit:8} {row.reach:>10} "
            f"{row.trials:>6}  {_VERDICTS[row.reached]}"
        )
        if row.note:
            print(f"    {row.note}")


def read_rows(path: Path) -> list[Row]:
    """Returns the rows of a file that ``write_json`` wrote; none if there is no file."""
    return [Row(**row) for row in json.loads(path.read_text())] if path.exists() else []


def with_table(document: str, rows: Sequence[Row]) -> str:
    """Returns the document with the table between its two marks replaced by these rows."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the document needs the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{_table(rows)}\n{END}{after}"


def _table(rows: Sequence[Row]) -> str:
    lines = [
        "| what | figure | reach | reached | trials | command |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        what = f"{row.what} (`{row.name}`)" + (f"; {row.note}" if row.note else "")
        trials = f"{row.trials:,}" + (" (short run)" if row.quick else "")
        reach = row.reach.replace("<=", "≤").replace(">=", "≥")
        reached = "**no**" if row.reached is False else _VERDICTS[row.reached]
        value = f"{row.value:,.0f}" if float(row.value).is_integer() else f"{row.value:.4g}"
        cells = (what, f"{value} {row.unit}".strip(), reach, reached, trials)
        lines.append(f"| {' | '.join(cells)} | `{row.command}` |")
    return "\n".join(lines)
