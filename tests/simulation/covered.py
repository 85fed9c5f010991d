"""How much of the cores that ship the simulator runs: lines and branches, by file.

    python -m tests.simulation.covered --seeds 120 --processes 2
    python -m tests.simulation.covered --seeds 120 --keep FOLDER --seconds 150   (again and again)

Runs seeds of the swarm, every fourth of them with a second user (`neighbour`), with a third one
(`newcomer`) and with jobs that have wishes (`wishes`), and the scenarios: those of the planted
bugs, without the bugs, those that once found one, those that come about seldom (`scenes`), and some
of sets of tasks, all under `coverage`. It tells what was never run, and fails if a seed does or if
less was run than `REACH_PERCENT`. With `--keep` measurements are kept, and the next call goes on
with what has not been run yet.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coverage import Coverage

from tests.simulation import wishes
from tests.simulation.cluster import services
from tests.simulation.draws import draw_shape
from tests.simulation.known import FOUND_BUGS, KNOWN, Known
from tests.simulation.runs import draw
from tests.simulation.scenes import SCENES

CORES = (
    "coordinator/control/core/*",
    "coordinator/aggregation/core/*",
    "worker/core/*",
    "storage/core/*",
    "phalanx/copies.py",
)
REACH_PERCENT = 95.0
NOT_REACHED = {
    r"raise InvariantBroken\(": "only a bug breaks an invariant; planted ones do",
    r"raise Internal\(": "only a bug leads there",
    r"raise (InvalidArgument|invalid)\(": "what is refused as malformed, no member or client that "
    "ships sends; tests/unit and tests/integration do",
    r"if TYPE_CHECKING:": "is never run",
}
"""Lines that no simulated cluster reaches, as regular expressions, and why; they do not count."""

TASK_SETS = tuple(Known(seed, settings=(("tasks", 2), ("shapes", ()))) for seed in range(12))
"""Runs of nothing but sets of tasks."""

ROOT = Path(__file__).resolve().parents[2]
FIRST = 1000
OTHERS_EVERY = 4


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.covered", description=__doc__)
    parser.add_argument("--seeds", type=int, default=120, help="how many seeds")
    parser.add_argument("--first", type=int, default=FIRST, help="the first seed")
    parser.add_argument("--processes", type=int, default=1, help="how many at once")
    parser.add_argument("--no-scenarios", action="store_true", help="only seeds")
    parser.add_argument("--keep", type=Path, help="folder of measurements to add to")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="begin no run after so long"
    )
    parser.add_argument("--run", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.run is not None:
        return _run(given.run.split(","), given.seconds)
    runs = [] if given.no_scenarios else list(_scenarios())
    runs += [str(seed) for seed in range(given.first, given.first + given.seeds)]
    with tempfile.TemporaryDirectory() as folder:
        measured = Measured(Path(folder) if given.keep is None else given.keep)
        left = [name for name in runs if name not in measured.done]
        shares = [left[first :: given.processes] for first in range(given.processes)]
        running = [measured.start(share, given.seconds) for share in shares if share]
        failed = [run.args for run in running if run.wait() != 0]
        measured.take_in()
        left = [name for name in runs if name not in measured.done]
        print(f"{len(runs) - len(left)} of {len(runs)} runs are measured", flush=True)
        if left:
            return 1 if failed else 0
        lines, branches, both = measured.tell()
    print(
        f"{both:.1f} % of the cores: {lines:.1f} % of lines, {branches:.1f} % of branches; "
        f"at least {REACH_PERCENT:g} % is asked"
    )
    return 1 if failed or both < REACH_PERCENT else 0


class Measured:
    """A folder of what was measured: the data of `coverage`, and which runs are in it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._folder = folder.resolve()
        self._settings = self._folder / "coverage.ini"
        self._settings.write_text(_settings(self._folder))
        self._done, self._began = self._folder / "done", self._folder / "began"
        # Of runs that were broken off nothing is known.
        self._began.unlink(missing_ok=True)

    @property
    def done(self) -> set[str]:
        """The names of the runs that are in it."""
        return set(self._done.read_text().split()) if self._done.exists() else set()

    def start(self, names: Sequence[str], seconds: float) -> subprocess.Popen[bytes]:
        """Measure some of the runs in a process of its own."""
        command = [sys.executable, "-m", "coverage", "run", f"--rcfile={self._settings}", "-m"]
        command += [__spec__.name, "--run", ",".join(names), f"--seconds={seconds}"]
        return subprocess.Popen(command, cwd=ROOT, stdout=self._began.open("a"))

    def take_in(self) -> None:
        """Add what has been measured since the last time."""
        names = self._began.read_text() if self._began.exists() else ""
        self._began.unlink(missing_ok=True)
        data = self._folder / "data"
        if data.exists():
            data.rename(self._folder / "data.before")
        self._coverage().combine(sorted(str(each) for each in self._folder.glob("data.*")))
        with self._done.open("a") as done:
            done.write(names)

    def tell(self) -> tuple[float, float, float]:
        """Report; returns how much of lines, of branches and of both was run, in percent."""
        measured = self._coverage()
        measured.load()
        measured.report(show_missing=True, skip_covered=True)
        report = self._folder / "report.json"
        measured.json_report(outfile=str(report))
        totals = json.loads(report.read_text())["totals"]
        return (
            100.0 * totals["covered_lines"] / totals["num_statements"],
            100.0 * totals["covered_branches"] / totals["num_branches"],
            totals["percent_covered"],
        )

    def _coverage(self) -> Coverage:
        return Coverage(config_file=str(self._settings))


def others(seed: int) -> dict[str, Any]:
    """What a seed has besides what it draws: of everything seldom a lot."""
    turn = seed % OTHERS_EVERY
    if turn == 0:
        return {"neighbour": True}
    if turn == 1:
        return {"newcomer": True}
    if turn == 2:
        return {}
    wishful = wishes.wishful(draw(seed), random.Random(f"wishes of {seed}"), draw_shape)
    return {name: getattr(wishful, name) for name in wishes.SETTINGS}


def _scenarios() -> dict[str, Known]:
    """Every scenario by a name that stays the same as long as it does."""
    return {
        hashlib.sha256(repr(known).encode()).hexdigest()[:12]: known
        for known in (*KNOWN.values(), *FOUND_BUGS, *SCENES, *TASK_SETS)
    }


def _run(names: Sequence[str], seconds: float) -> int:
    """Run seeds and scenarios by name, as long as there is time; this is what is measured."""
    until_s, scenarios, failed = time.monotonic() + seconds, _scenarios(), 0
    with services() as given:
        for name in names:
            if time.monotonic() >= until_s:
                break
            known = scenarios.get(name)
            if known is None:
                known = Known(int(name), settings=tuple(others(int(name)).items()))
            failure = known.run(given).failure
            if failure:
                failed += 1
                print(f"{known}: {failure}", file=sys.stderr)
            print(name, flush=True)
    return 1 if failed else 0


def _settings(folder: Path) -> str:
    cores, lines = ("\n    ".join(each) for each in (CORES, NOT_REACHED))
    return (
        f"[run]\nbranch = True\nparallel = True\nrelative_files = True\ndata_file = {folder}/data\n"
        f"include =\n    {cores}\n"
        f"[report]\nexclude_also =\n    {lines}\n"
    )


if __name__ == "__main__":
    sys.exit(main())
