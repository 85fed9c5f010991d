"""Directed scenarios of what comes about too seldom by chance, and what each of them must show."""

from __future__ import annotations

from tests.simulation.known import Known
from tests.simulation.wishes import Wish

_MAY_FALL_BACK = ("wishes", (Wish(fall_back_s=2.0),) * 2)

SCENES = {
    # Three say three different things of the same leaf, and the fourth is away.
    Known(
        0,
        (),
        (
            ("workers", 4),
            ("liars", 2),
            ("unequal", True),
            ("parts", "3 replicas"),
            ("script", "few_verifiers"),
            ("script_s", 0.2),
        ),
    ): "WAITING_FOR_VERIFIERS",
    # One that lies has been caught, and one of the two that do not is away.
    Known(
        0,
        ("kill_control",),
        (("workers", 3), ("liars", 1), ("parts", "3 replicas"), ("script", "few_verifiers")),
    ): "WAITING_FOR_VERIFIERS",
    # Nobody gives the bits any more that the job began with; it may go on with others.
    Known(
        1, (), (("workers", 3), ("mixed", True), ("script", "workers_gone"), _MAY_FALL_BACK)
    ): "WAITING_FOR_FINGERPRINT",
    Known(
        1, (), (("workers", 2), ("aggregators", 2), ("script", "aggregators_gone"), _MAY_FALL_BACK)
    ): "WAITING_FOR_FINGERPRINT",
    # The initial parameters are all that an audit looks at for certain; liars begin anew.
    Known(
        2,
        ("kill_control", "kill_worker"),
        (("workers", 4), ("liars", 2), ("unequal", True), ("parts", "audit")),
    ): "",
    Known(
        3,
        ("kill_control", "kill_worker", "worker_leaves"),
        (("workers", 4), ("liars", 2), ("unequal", True), ("parts", "3 replicas, int8, median")),
    ): "",
}
"""Each with a reason that somebody must have been told for a job; empty: liars are caught."""
