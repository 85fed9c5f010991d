"""Scenarios that come about too seldom by chance; a part of the swarm runs them with its seeds.

Most of what they show, other faults would hide: whatever a job is rolled back for, that control
took a range for no reason cannot be told from it.
"""

from __future__ import annotations

import random
from typing import Any

from tests.simulation.jobs import Shape, composed

Rare = tuple[tuple[str, ...], tuple[tuple[str, Any], ...]]
"""Kinds of fault, and settings."""

SHARE = 0.03
"""Part of the swarm that they are."""


def bad_jobs(bad: str, *parts: str, **more: object) -> tuple[str, tuple[Shape, ...]]:
    """One short job for each of these parts, all bad in the same way."""
    shape = Shape(bad=bad, **more)  # type: ignore[arg-type]
    return "shapes", tuple(composed(shape, each) for each in parts or ("",))


SHORT: dict[str, object] = {"elements": 40, "shards": 3, "steps": 8, "checkpoint_every": 3}

_ONE_LEADER = (("controls", 1), ("aggregators", 1), ("terms_max", 1), ("at_once", True))
DEAF: Rare = (
    (),
    (
        *_ONE_LEADER,
        ("workers", 3),
        ("leaf_s", 0.5),
        ("faults_s", 18.0),
        ("script", "deaf_leader"),
        ("shapes", (Shape(elements=40, shards=6, steps=40, checkpoint_every=3),)),
        ("loses_nobody", True),
    ),
)
"""A leader hears none of its members for almost a lease, again and again."""
UNHEARD: Rare = (
    (),
    (*_ONE_LEADER, ("workers", 3), ("leaf_s", 0.1), ("script", "unheard_aggregators")),
)
"""A leader hears of no aggregator for longer than a lease, and of workers who get further."""
TAKEN_OVER: Rare = (
    (),
    (
        ("controls", 2),
        ("terms_max", 1),
        ("at_once", True),
        ("workers", 3),
        ("leaf_s", 0.1),
        ("script", "leaders_die"),
        ("faults_s", 12.0),
    ),
)
"""One leader after another dies, and nothing else."""
ASLEEP: Rare = (
    ("pause_control",),
    (("controls", 1), ("aggregators", 1), ("workers", 2), ("loses_nobody", True)),
)
"""A leader is stopped for longer than a lease."""

GARBAGE: Rare = (
    ("kill_control", "kill_worker", "kill_aggregator"),
    (
        ("garbage_s", 1.0),
        ("controls", 2),
        ("aggregators", 1),
        ("workers", 2),
        ("stranger", True),
        ("faults_s", 9.0),
        ("leaf_s", 0.3),
        ("converges_s", 150.0),
        bad_jobs("", steps=60, evaluate_every=9),
    ),
)
"""Garbage is collected all the time, and somebody tries what the contract forbids."""

OVERFLOW: Rare = (
    (),
    (
        ("workers", 3),
        bad_jobs("overflow", "all-reduce", "bfloat16", **SHORT),
        ("fails", "PARAMETERS_NON_FINITE"),
    ),
)
"""Leaves are finite, and their sum is not."""

PLATEAU: Rare = (
    ("kill_aggregator", "kill_control"),
    (("shapes", (Shape(evaluate_every=8, plateau=5, checkpoint_every=3, steps=60),)),),
)
"""A job ends once its evaluations do not change any more, and is rolled back before."""
FULL: Rare = (
    (),
    (
        ("controls", 1),
        ("shapes", (Shape(), Shape(elements=40), Shape(elements=160))),
        ("workers", 3),
        ("script", "disk_full"),
        ("at_once", True),
        ("faults_s", 12.0),
        ("leaf_s", 0.15),
        ("converges_s", 150.0),
        ("changes", ((2.0, "pause", 0), (5.0, "pause", 1), (5.5, "cancel", 2))),
    ),
)
"""Storage's disk is full for a while; jobs are paused and cancelled meanwhile."""

CUT_OFF: Rare = (
    (),
    (
        ("controls", 2),
        ("workers", 2),
        ("shapes", (Shape(steps=50), Shape(elements=40, steps=50))),
        ("leaf_s", 0.2),
        ("script", "two_leaders"),
        ("script_s", 0.5),
        ("faults_s", 14.0),
        ("converges_s", 150.0),
        ("lists", True),
    ),
)
"""A leader that is cut off from storage, and replaced, is asked for its jobs."""

AGAIN: Rare = (
    ("kill_aggregator",),
    (
        ("controls", 1),
        ("aggregators", 2),
        ("workers", 2),
        ("misdelivered", "RaiseTerm"),
        ("every_s", 0.8),
        ("faults_s", 9.0),
        ("leaf_s", 0.1),
        ("shapes", (Shape(steps=50, checkpoint_every=3), Shape(elements=40, steps=50))),
        ("converges_s", 150.0),
    ),
)
"""Of what raises a job's term copies arrive when it has been raised again."""

LAGGARD: Rare = (
    (),
    (
        ("workers", 2),
        ("faults_s", 8.0),
        ("range_min_bytes", 1 << 20),
        ("script", "others_leave_a_laggard"),
    ),
)
"""A worker falls behind for good, and then the others are gone. Any fault that breaks its stream
would help it."""


def program_struck(kind: str) -> Rare:
    """Programs of which somebody is killed again and again: once storage has results of tasks that
    others read."""
    return (
        ("kill_aggregator", "kill_storage", "kill_worker"),
        (
            ("shapes", ()),
            ("programs", 2),
            ("aggregators", 2),
            ("workers", 2),
            ("strike", f"tasks_journalled {kind} kill"),
        ),
    )


CUT_MESSAGES: Rare = (
    ("kill_worker",),
    (
        ("shapes", ()),
        ("programs", 2),
        ("limits", (("coordinator.aggregation.tasks:INPUTS_BYTES", 100),)),
    ),
)
"""Messages are cut in two that tell of more than one task and what it reads."""

ORPHANED_TASKS: Rare = (
    (),
    (
        ("shapes", ()),
        ("programs", 2),
        ("workers", 2),
        ("script", "leaf_servers_die"),
        ("script_s", 0.3),
        ("faults_s", 4.0),
    ),
)
"""Whoever starts leaf processes is gone again and again, and tasks that read others' with it."""

RARE = (DEAF, UNHEARD, TAKEN_OVER, ASLEEP, GARBAGE, PLATEAU, FULL, LAGGARD)
"""Those in which any seed must do well."""


def drawn(chance: random.Random) -> Rare | None:
    """What a seed of the swarm is instead of what it draws; mostly nothing."""
    return chance.choice(RARE) if chance.random() < SHARE else None
