"""The values that labels of control's metrics can have: as many series as these, and no more."""

from __future__ import annotations

from phalanx.v1.coordination_service_pb2 import LeafFailed

EVENT_TYPES = (
    *("JOB_QUEUED", "JOB_STARTED", "JOB_WAITING", "JOB_PAUSED", "JOB_RESUMED"),
    *("JOB_SUCCEEDED", "JOB_FAILED", "JOB_CANCELLED"),
    *("WORKER_JOINED", "WORKER_SUSPECTED", "WORKER_LOST", "WORKER_DRAINING", "WORKER_LEFT"),
    *("WORKER_INELIGIBLE", "WORKER_QUARANTINED"),
    *("SHARDS_MOVED", "SPECULATION_STARTED", "AGGREGATOR_LOST", "STEPS_REPLAYED"),
    *("CONTROL_TOOK_OVER", "CHECKPOINT_COMMITTED", "CHECKPOINT_CORRUPT"),
    *("STORAGE_UNAVAILABLE", "STORAGE_RESTORED", "NON_FINITE_REFUSED", "POISON_SHARD"),
    *("BIT_IDENTITY_LOST", "RECOVERED", "MODEL_REGISTERED"),
)

_PROGRAMS = ("train", "tasks")
_OUTCOMES = ("done", *(name[5:].lower() for name, number in LeafFailed.Kind.items() if number))
_REDISPATCHES = (
    *("worker_lost", "worker_silent", "hang", "late", "lost", "silent", "failed", "leaf_failed"),
    *("drain", "take_over", "fall_back", "fingerprint", "quarantine", "not_prepared", "other"),
)
_MEMBER_PHASES = ("suspect", "detect", "redispatch", "recompute", "commit", "total")
_PHASES = {
    "late": _MEMBER_PHASES,
    "worker_silent": _MEMBER_PHASES,
    "worker_lost": _MEMBER_PHASES,
    "hang": _MEMBER_PHASES,
    "aggregator_lost": _MEMBER_PHASES,
    "control_lost": ("detect", "replay", "adopt", "commit", "total"),
    "storage_lost": ("detect", "total"),
}

KNOWN: dict[str, list[dict[str, str]]] = {
    "tasks_total": [{"program": p, "outcome": o} for p in _PROGRAMS for o in _OUTCOMES],
    "redispatches_total": [{"cause": cause} for cause in _REDISPATCHES],
    "recovery_seconds": [
        {"cause": cause, "phase": phase} for cause, phases in _PHASES.items() for phase in phases
    ],
}
"""The labels of each metric that the core adds to."""
