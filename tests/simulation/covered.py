"""How much of the cores that ship the simulator runs: lines and branches, by file.

    python -m tests.simulation.covered --seeds 120 --processes 2

Runs seeds of the swarm, every fourth of them with a second user (`neighbour`), with a third one
(`newcomer`) and with jobs that have wishes (`wishes`), and the scenarios: those of the planted
bugs, without the bugs, and those that come about seldom (`scenes`), all under `coverage`. It tells
what was never run, and fails if a seed does or if less was run than `REACH_PERCENT`.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coverage import Coverage

from tests.simulation import wishes
from tests.simulation.runs import draw, draw_shape

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

ROOT = Path(__file__).resolve().parents[2]
FIRST = 1000
OTHERS_EVERY = 4
SEEDS = """
from tests.simulation.cluster import services
from tests.simulation.covered import others
from tests.simulation.runs import simulate
with services() as given:
    for seed in {block!r}:
        more = others(seed)
        failure = simulate(given, seed, **more).failure
        assert failure == "", (seed, more, failure)
"""
SCENARIOS = """
from tests.simulation.cluster import services
from tests.simulation.known import KNOWN
from tests.simulation.scenes import SCENES
with services() as given:
    for known in dict.fromkeys([*KNOWN.values(), *SCENES]):
        assert known.run(given).failure == "", known
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.covered", description=__doc__)
    parser.add_argument("--seeds", type=int, default=120, help="how many seeds")
    parser.add_argument("--first", type=int, default=FIRST, help="the first seed")
    parser.add_argument("--processes", type=int, default=1, help="how many at once")
    parser.add_argument("--no-scenarios", action="store_true", help="only seeds")
    given = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder) / "coverage.ini"
        settings.write_text(_settings(folder))
        programs = [
            SEEDS.format(
                block=range(first, given.first + given.seeds, given.processes),
            )
            for first in range(given.first, given.first + given.processes)
        ]
        programs += [] if given.no_scenarios else [SCENARIOS]
        running = [_start(settings, number, each) for number, each in enumerate(programs)]
        failed = [run.args for run in running if run.wait() != 0]
        measured = Coverage(config_file=str(settings))
        measured.combine()
        share = measured.report(show_missing=True, skip_covered=True)
    print(
        f"{share:.1f} % of lines and branches of the cores; at least {REACH_PERCENT:g} % is asked"
    )
    return 1 if failed or share < REACH_PERCENT else 0


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


def _settings(folder: str) -> str:
    cores, lines = ("\n    ".join(each) for each in (CORES, NOT_REACHED))
    return (
        f"[run]\nbranch = True\nparallel = True\ndata_file = {folder}/data\n"
        f"include =\n    {cores}\n"
        f"[report]\nexclude_also =\n    {lines}\n"
    )


def _start(settings: Path, number: int, program: str) -> subprocess.Popen[bytes]:
    """Run a program under coverage."""
    file = settings.parent / f"program_{number}.py"
    file.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{program}")
    command = [sys.executable, "-m", "coverage", "run", f"--rcfile={settings}", str(file)]
    return subprocess.Popen(command, cwd=ROOT)


if __name__ == "__main__":
    sys.exit(main())
