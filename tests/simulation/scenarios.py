"""Every directed scenario by a name, so that one command replays it."""

from __future__ import annotations

import shlex
from functools import cache

from tests.simulation.known import (
    CONTROL_DIES,
    FOUND_BUGS,
    KNOWN,
    MISJUDGED,
    NEWCOMERS,
    Known,
)
from tests.simulation.outcome import Outcome
from tests.simulation.scenes import SCENES


@cache
def scenarios() -> dict[str, Known]:
    """Scenarios by name: what a planted bug is known by, and the kind and place of the others."""
    numbered = {
        "found": FOUND_BUGS,
        "misjudged": MISJUDGED,
        "scene": tuple(SCENES),
        "newcomer": NEWCOMERS,
        "control-dies": CONTROL_DIES,
    }
    found = {f"known/{name.replace(' ', '-')}": known for name, known in KNOWN.items()}
    for kind, all_of in numbered.items():
        found |= {f"{kind}/{number}": known for number, known in enumerate(all_of)}
    return found


def command_of(name: str) -> str:
    """What replays a scenario exactly."""
    return f"python -m tests.simulation --scene {shlex.quote(name)}"


def told_of(name: str, outcome: Outcome) -> str:
    """One line on a scenario, with the command that replays it where it failed."""
    if not outcome.failure:
        return f"{name}: {outcome.steps} steps, {outcome.faults.total()} faults, right"
    return f"{name}: {outcome.failure}\n  {command_of(name)}"
