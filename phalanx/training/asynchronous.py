"""Contributions that commit one by one: which shard may start which of its steps.

Theory of operation. Each shard counts its own steps and is at one of them at a time: it starts step
c once its step c - 1 has committed, at any version from then on. Each commit makes a version. A
step of the job is as many commits as there are shards, whoever's they are, so that its stop rules,
curves and checkpoints mean what they mean where all shards commit together.

Two things keep a shard from starting. The *bound* s of stale-bounded training: step c starts only
where c - min <= s, min being the fewest steps that any shard has completed. And the *limit*, a step
that no shard starts before all have completed the ones below it: the end of the job, an evaluation,
a barrier that the job asks for. Then all shards are at the same step and nothing is under way.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from phalanx.errors import DataLoss, InvalidArgument
from phalanx.texts import number_of
from phalanx.v1.job_spec_pb2 import Train

NO_LIMIT = 1 << 62
"""No step, version or count of a job gets so far."""


class Clocks:
    """Completed steps of each shard, and what may start next."""

    def __init__(
        self, shards: int, bound: int | None = None, completed: Sequence[int] | None = None
    ) -> None:
        """`bound` is None where shards need not wait for each other."""
        self._completed = [0] * shards if completed is None else [int(each) for each in completed]
        if len(self._completed) != shards or min(self._completed) < 0:
            count = number_of(shards, "shard")
            raise InvalidArgument(f"{completed!r} are not the steps of {count}")
        self._bound = bound
        self._least = min(self._completed)
        #: No shard starts this step yet, nor a later one.
        self.limit = NO_LIMIT

    @property
    def completed(self) -> tuple[int, ...]:
        """Steps that each shard has completed, which is also the number of its next one."""
        return tuple(self._completed)

    @property
    def total(self) -> int:
        """Commits so far."""
        return sum(self._completed)

    @property
    def least(self) -> int:
        """The fewest steps that any shard has completed."""
        return self._least

    def step_of(self, shard: int) -> int:
        """The step that the shard is at: the first one that it has not completed."""
        return self._completed[shard]

    def may_start(self, shard: int) -> bool:
        """Whether the shard may start the step that it is at."""
        step = self._completed[shard]
        if step >= self.limit:
            return False
        return self._bound is None or step - self._least <= self._bound

    def first_of(self, shards: Iterable[int]) -> int | None:
        """Of those shards that may start, the one that is furthest behind; the lowest of equals."""
        able = [(self._completed[shard], shard) for shard in shards if self.may_start(shard)]
        return min(able)[1] if able else None

    def commit(self, shard: int, step: int) -> None:
        """Count a step of a shard as completed: the one that it is at, and no other."""
        if step != self._completed[shard]:
            raise InvalidArgument(
                f"shard {shard} is at step {self._completed[shard]} and cannot complete step {step}"
            )
        self._completed[shard] += 1
        if step == self._least:
            self._least = min(self._completed)


def stale_bound(train: Train) -> int | None:
    """Return how many steps a shard may be ahead of the slowest; None: no bound."""
    return train.stale.bound if train.HasField("stale") else None


def limit_after(step: int, intervals: Iterable[int], total_steps: int) -> int:
    """Return the first limit above `step`: a multiple of one of `intervals`, or the last step.

    An interval of 0 has no multiples, and `total_steps` of 0 no end.
    """
    limits = [(step // every + 1) * every for every in intervals if every > 0]
    if total_steps:
        limits.append(total_steps)
    return min(limits, default=NO_LIMIT)


def completed_steps(root_state: str, shards: int, step: int) -> list[int]:
    """Return the steps that each shard had completed at the checkpoint of a step.

    Raises DataLoss where what its root kept does not fit.
    """
    try:
        completed = [int(each) for each in json.loads(root_state)["completed_steps"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataLoss(
            f"the checkpoint at step {step} does not say how far shards are: {error!r}"
        ) from None
    if len(completed) != shards or min(completed) < 0 or sum(completed) != step * shards:
        raise DataLoss(f"the checkpoint at step {step} is not one of {number_of(shards, 'shard')}")
    return completed


@dataclass
class StepSums:
    """What the commits of one step of the job add up to."""

    commits: int = 0
    count: int = 0
    loss: float = 0.0
    staleness: int = 0

    def add(self, count: int, loss: float, staleness: int) -> None:
        """Add one commit, in the order in which they come."""
        self.commits += 1
        self.count += count
        self.loss += loss
        self.staleness += staleness

    @property
    def measured(self) -> dict[str, float]:
        """What is told of the step beside its loss."""
        return {STALENESS: self.staleness / self.commits} if self.commits else {}


STALENESS = "train/staleness"
"""Mean of the versions that were made between reading the parameters and committing."""
