"""What people are told of workers that have to agree and do not, wherever a verified job waits."""

from __future__ import annotations

from coordinator.control.core.state import Core
from phalanx.texts import number_of, verb_for
from phalanx.v1.cluster_service_pb2 import Worker as WorkerView


def different_results(results: int) -> str:
    """Say that what came differs, where it does."""
    return f", with {number_of(results, 'different result')}" if results > 1 else ""


def possible_cause(results: int) -> str:
    """Say what else than a lie differs everywhere, where more than two results differ."""
    if results <= 2:
        return ""
    return " (code that depends on more than its seed and its rows differs, too)"


def quarantined(core: Core) -> list[str]:
    """Return the workers in quarantine, by id."""
    return sorted(
        worker.id
        for worker in core.workers.values()
        if worker.state == WorkerView.STATE_QUARANTINED
    )


def quarantined_workers(core: Core) -> str:
    """Say who is in quarantine, if anybody is."""
    out = quarantined(core)
    return f"; {', '.join(out)} {verb_for(len(out), 'is', 'are')} quarantined" if out else ""
