"""Directed scenarios of what comes about too seldom by chance, and what each of them must show."""

from __future__ import annotations

from functools import partial

from coordinator.control.core.state import CoreConfig
from tests.simulation.known import Known
from tests.simulation.moments import BETWEEN_ROUNDS
from tests.simulation.outcome import Outcome
from tests.simulation.rare import (
    AGAIN,
    CUT_OFF,
    DEAF,
    FULL,
    GARBAGE,
    OVERFLOW,
    PLATEAU,
    SHORT,
    UNHEARD,
    bad_jobs,
    program_struck,
)
from tests.simulation.wishes import Wish

_MAY_FALL_BACK = ("wishes", (Wish(fall_back_s=2.0),) * 2)

_KEEPING = {"best": True, "evaluate_every": 4, "checkpoint_every": 5, "steps": 30}
_IN_OTHER_WAYS = (
    "asynchronous",
    "stale 1",
    "local, inner state",
    "top-k",
    "1 backup",
    "3 replicas",
)

_UPDATED = {"checkpoint_every": 5, "steps": 30}
_BY_COLUMNS = ("columns", "columns, clipped gradient", "columns, 3 replicas")
_BY_UPDATES = ("boosting", "cocoa", "cocoa, 3 replicas", "k-means")

_CORE_CONFIG = "coordinator.control.config:CoreConfig"


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
    # The leaf that is to make the initial parameters never ends, and nobody ends its process.
    Known(
        3,
        ("kill_control",),
        (
            ("workers", 3),
            ("script", "hangs_at_once"),
            ("script_s", 0.0),
            ("leaf_timeout_s", 600.0),
            bad_jobs("", "all-reduce", steps=20),
        ),
    ): "begun_for",
    # Nobody gives the bits any more that the job began with; it may go on with others.
    Known(
        3, (), (("workers", 3), ("mixed", True), ("script", "workers_gone"), _MAY_FALL_BACK)
    ): "WAITING_FOR_FINGERPRINT",
    Known(
        1, (), (("workers", 2), ("aggregators", 2), ("script", "aggregators_gone"), _MAY_FALL_BACK)
    ): "WAITING_FOR_FINGERPRINT",
    # The initial parameters are all that an audit looks at for certain; liars begin anew.
    Known(
        2,
        ("kill_control", "kill_worker"),
        (("workers", 4), ("liars", 2), ("unequal", True), ("parts", "audit")),
    ): "quarantines",
    Known(
        3,
        ("kill_control", "kill_worker", "worker_leaves"),
        (("workers", 4), ("liars", 2), ("unequal", True), ("parts", "3 replicas, int8, median")),
    ): "quarantines",
    # Those that lie do so from the first thing that they are asked of a job.
    Known(
        4,
        ("kill_control", "kill_worker"),
        (
            ("workers", 4),
            ("liars", 2),
            ("unequal", True),
            ("from_the_first", True),
            ("parts", "3 replicas, local"),
        ),
    ): "quarantines",
    # One has another version of a library: it is honest, and knows nothing of what the others do.
    Known(
        0,
        ("kill_control", "kill_worker", "worker_leaves"),
        (("workers", 4), ("old", True), ("parts", "3 replicas")),
    ): "of_one_version",
    Known(
        1,
        ("kill_control", "kill_worker"),
        (
            ("workers", 4),
            ("old", True),
            ("liars", 1),
            ("from_the_first", True),
            ("parts", "3 replicas, local"),
        ),
    ): "quarantines",
    # One that does is there, and one of the two that do not is away.
    Known(
        0,
        (),
        (
            ("workers", 3),
            ("liars", 1),
            ("from_the_first", True),
            ("parts", "audit"),
            ("script", "few_verifiers"),
            ("script_s", 0.0),
        ),
    ): "WAITING_FOR_VERIFIERS",
    # One worker after another is asked to build a model and does not come to an end.
    Known(
        4,
        (),
        (
            ("workers", 3),
            bad_jobs("endless"),
            ("fails", "DESCRIBE_TIMEOUT"),
            ("limits", ((_CORE_CONFIG, partial(CoreConfig, describe_timeout_s=1.0)),)),
        ),
    ): "DESCRIBE_TIMEOUT",
    Known(
        4, ("kill_worker",), (bad_jobs("empty"), ("fails", "DESCRIBE_FAILED"))
    ): "DESCRIBE_FAILED",
    # All is done, and storage takes no more models.
    Known(
        5,
        ("kill_control",),
        (bad_jobs("", **SHORT), ("namespace_bytes", 600), ("fails", "QUOTA_EXCEEDED")),
    ): "QUOTA_EXCEEDED",
    # Leaves that are bad in some of the ways in which contributions are put together.
    Known(
        10,
        (),
        (
            ("workers", 3),
            bad_jobs("skip", "asynchronous", "median", "all-reduce", "3 replicas", **SHORT),
        ),
    ): "left_out",
    Known(10, (), (("workers", 2), bad_jobs("void", "median", "all-reduce", **SHORT))): "left_out",
    Known(10, *OVERFLOW): "PARAMETERS_NON_FINITE",
    Known(
        10,
        (),
        (
            ("workers", 3),
            bad_jobs("poison", "asynchronous", "all-reduce", **SHORT),
            ("fails", "POISON_SHARD"),
        ),
    ): "POISON_SHARD",
    Known(
        10, (), (("workers", 3), bad_jobs("nan", "all-reduce", **SHORT), ("fails", "NON_FINITE"))
    ): "NON_FINITE",
    # Whoever starts leaf processes is killed, by a leaf, and again and again by chance.
    Known(
        7,
        (),
        (
            ("workers", 2),
            bad_jobs("deadly", steps=20),
            ("script", "leaf_servers_die"),
            ("script_s", 0.5),
            ("faults_s", 3.0),
        ),
    ): "orphaned",
    # Whoever is to own the parameters has not the memory for them; then nobody has.
    Known(9, (), (("aggregators", 2), ("small", 1), bad_jobs("", **SHORT))): "steps",
    Known(
        9, (), (("aggregators", 2), ("small", 2), ("fails", "AGGREGATOR_MEMORY"))
    ): "AGGREGATOR_MEMORY",
    # What storage says of its checkpoints, or of the job, is not what it was told.
    Known(
        0, (), (("script", "checkpoints_rot"), ("script_s", 1.0), bad_jobs("", steps=20))
    ): "terms",
    Known(0, (), (("script", "job_rots"), ("fails", "ROW_CORRUPT"))): "ROW_CORRUPT",
    # The best evaluation is kept, whoever is killed, in whatever way the parameters are made.
    Known(
        14,
        ("kill_aggregator", "kill_control", "kill_storage", "kill_worker"),
        (("workers", 3), ("aggregators", 2), ("range_min_bytes", 64), bad_jobs("", **_KEEPING)),
    ): "kept",
    Known(
        11,
        ("kill_aggregator", "kill_worker"),
        (("workers", 4), bad_jobs("", *_IN_OTHER_WAYS, **_KEEPING)),
    ): "kept",
    Known(
        12,
        ("kill_worker", "worker_joins", "worker_leaves", "broken_connections"),
        (("workers", 3), bad_jobs("", "all-reduce", "all-reduce, local", **_KEEPING)),
    ): "kept",
    # Between the two rounds of a step the one is killed who has what the first of them gave.
    Known(
        5,
        ("kill_control", "kill_storage"),
        (
            ("workers", 3),
            ("aggregators", 2),
            ("strike", f"{BETWEEN_ROUNDS} aggregator kill"),
            bad_jobs("", *_BY_COLUMNS, **_UPDATED),
        ),
    ): "cut_between",
    # What an update keeps from step to step is restored.
    Known(
        6,
        ("kill_aggregator", "kill_control", "kill_storage", "kill_worker"),
        (("workers", 2), bad_jobs("", *_BY_UPDATES, **_UPDATED)),
    ): "rolled_back",
    # The best version of such jobs is without what they keep for themselves.
    Known(
        7,
        ("kill_aggregator", "kill_worker"),
        (("workers", 3), bad_jobs("", "columns", "cocoa", "boosting", **_KEEPING)),
    ): "kept",
    # Results of tasks are read by others, whoever is killed once storage has them.
    Known(0, *program_struck("aggregator")): "tasks_taken_over",
    Known(1, *program_struck("storage")): "results_read",
    Known(0, *DEAF): "deaf",
    Known(0, *UNHEARD): "silent",
    # Garbage is collected all the time, and somebody tries what the contract forbids.
    Known(8, *GARBAGE): "strange",
    # So it is where jobs are forgotten by a leader whose clock is behind that of the one before.
    Known(2533): "strange",
    Known(0, *PLATEAU): "rolled_back",
    Known(0, *FULL): "sent_away",
    # A leader that is cut off from storage, and replaced, is asked for its jobs.
    Known(4, *CUT_OFF): "incomplete",
    # Of what raises a job's term copies arrive when it has been raised again.
    Known(0, *AGAIN): "again",
}
"""Each with what it must show: a reason that somebody must have been told for a job, in capitals,
or what of its outcome must have come about."""


def shown(outcome: Outcome, what: str) -> int:
    """How often a scene showed what it has to."""
    found: int = outcome.reasons[what] if what.isupper() else getattr(outcome, what)
    return found
