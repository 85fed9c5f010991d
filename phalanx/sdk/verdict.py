"""What verifying a finished job finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from phalanx.training.ledger import Ledger


@dataclass(frozen=True)
class TaskLedger:
    """How many results the tasks of a set have in its journal.

    Attributes:
        tasks: tasks of the set.
        done: tasks whose function has returned.
        given_up: numbers of the tasks that were given up; their failure is their result.
        doubled: numbers of the tasks with more than one result.
        missing: numbers of the tasks without one.
    """

    tasks: int
    done: int
    given_up: tuple[int, ...] = ()
    doubled: tuple[int, ...] = ()
    missing: tuple[int, ...] = ()

    @property
    def balanced(self) -> bool:
        """Whether every task has exactly one result."""
        return not (self.doubled or self.missing)

    def to_json(self) -> dict[str, object]:
        """Return it as a part of the JSON of ``phalanx verify``."""
        return {
            "balanced": self.balanced,
            "tasks": self.tasks,
            "done": self.done,
            "given_up": list(self.given_up),
            "doubled": list(self.doubled),
            "missing": list(self.missing),
        }


@dataclass(frozen=True)
class Verdict:
    """The ledger of a job, and both hashes of its parameters.

    ``ledger`` says how often each example was used; a set of tasks has ``tasks`` in its place, and
    a job whose rows are drawn by a secret has none.
    ``not_compared`` says why the parameters could not be computed again, or why other bits would
    prove nothing; it is empty where the hashes are to be equal, and for sets of tasks, which have
    none. Of a program without a model the hashes are those of its outcome.
    """

    job_id: str
    steps: int
    cluster_sha256: str
    local_sha256: str
    bit_identical: bool
    #: What it depends on is given by a log: which contributions were applied, in which order.
    replayed: bool = False
    #: Where the bits differ: whether this process has the numeric fingerprint of the workers.
    like_workers: bool = False
    ledger: Ledger | None = None
    tasks: TaskLedger | None = None
    not_compared: str = ""

    @property
    def equal(self) -> bool:
        """Whether this process computed the same bits."""
        return bool(self.local_sha256) and self.cluster_sha256 == self.local_sha256

    @property
    def compared(self) -> bool:
        """Whether there are two hashes that have to be equal."""
        return bool(self.cluster_sha256) and not self.not_compared

    @property
    def balanced(self) -> bool:
        """Whether the ledger balances."""
        ledger = self.tasks or self.ledger
        return ledger is None or ledger.balanced

    @property
    def wrong(self) -> bool:
        """Whether anything was found that must not be."""
        return not self.balanced or (self.compared and not self.equal)

    @property
    def explanation(self) -> str:
        """Why the hashes may differ."""
        if self.replayed:
            return (
                "the contributions and their order are those of the log, so either this machine's "
                "processor or library versions have another numeric fingerprint, or the workers' "
                "differed, or the job's code is not a pure function of its arguments"
            )
        if self.like_workers:
            return (
                "this machine has the numeric fingerprint of the workers, so either the job's code "
                "is not a pure function of its arguments, or something is broken"
            )
        return (
            "either this machine's processor or library versions have another numeric fingerprint "
            "(`phalanx workers --json` shows the workers'), or the job's code is not a pure "
            "function of its arguments, or something is broken"
        )

    def to_json(self) -> dict[str, object]:
        """Return the JSON of ``--json``."""
        return {
            "job_id": self.job_id,
            "steps": self.steps,
            "cluster_sha256": self.cluster_sha256,
            "local_sha256": self.local_sha256,
            "equal": self.equal,
            "compared": self.compared,
            "not_compared": self.not_compared,
            "balanced": self.balanced,
            "ledger": None if self.ledger is None else self.ledger.to_json(),
            "tasks": None if self.tasks is None else self.tasks.to_json(),
        }
