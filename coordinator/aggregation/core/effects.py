"""What the core asks its runtime to do. Nothing here has to be durable before it is sent: what must
outlive the process is in checkpoints, and a job that loses its aggregator replays from one."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.aggregation.core.state import Snapshot
from phalanx.copies import Order
from phalanx.reduction import Node
from phalanx.v1 import training_pb2


@dataclass(frozen=True)
class Wake:
    """Frames or go records became available: let the senders look."""


@dataclass(frozen=True)
class Work:
    """There is work that takes long: `JobRanges.work` does a slice of it, until none is left."""


@dataclass(frozen=True)
class Committed:
    """Range 0 is whole at `version`: one more step is done."""

    version: int
    example_count: int
    #: Examples that the sampler gave to the step; more than the count where shards were absent.
    expected_count: int
    #: Of each contribution: versions made between what it has read and its commit.
    staleness: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Refused:
    """Contributions to the step that made `version` were not finite; the reducer left them out."""

    version: int
    shards: tuple[int, ...]


@dataclass(frozen=True)
class Points:
    """New metric points (version, name, value); a replayed step gives equal ones."""

    points: tuple[tuple[int, str, float], ...]


@dataclass(frozen=True)
class StartCheckpoint:
    """Write this range as its part of the checkpoint of one version, in the background."""

    version: int
    final: bool
    #: The term ends with it: everything waits until it is complete.
    terminal: bool
    snapshot: Snapshot
    #: JSON of range 0's decisions; empty where range 0 is owned elsewhere.
    root_state: str = ""


@dataclass(frozen=True)
class Ended:
    """A terminal go record is in force; a checkpoint that it asked for was started before."""

    go: training_pb2.GoRecord


@dataclass(frozen=True)
class Failed:
    """The job cannot go on. Range 0 also issued a terminal go record, other ranges cannot."""

    reason: str
    message: str


@dataclass(frozen=True)
class Ask:
    """Ask a worker for copies of contributions."""

    order: Order


@dataclass(frozen=True)
class Verified:
    """As many copies of a contribution as needed are equal, and it counts."""


@dataclass(frozen=True)
class Caught:
    """A worker's copy of a contribution was outvoted; told once for each start of a worker."""

    worker_id: str
    incarnation: str
    #: Of the round.
    version: int
    action: training_pb2.GoRecord.Action.ValueType
    node: Node
    digest: str
    majority: str
    agreed: tuple[str, ...]


Effect = (
    Wake
    | Work
    | Committed
    | Refused
    | Points
    | StartCheckpoint
    | Ended
    | Failed
    | Ask
    | Verified
    | Caught
)
