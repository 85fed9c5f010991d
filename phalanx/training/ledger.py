"""The ledger of a job: how often each example was used in each epoch.

Theory of operation. What a job has committed is told by its *books*: the steps that each shard has
completed, the contributions that were applied where a log names them, those that were left out, and
how many examples entered the steps. The job's own sampler is asked again which rows it gives to
each of these contributions, and the rows are counted, epoch by epoch. In an epoch that all shards
have been through, each row comes as often as the epoch has it: once, or more often where classes
are oversampled. Each row that does not is *missing* there, unless its contribution was left out,
and rows beyond are *doubled*. In an epoch that the job ended in, rows may only be doubled.

Nothing is computed from a formula that the job itself could have been wrong about: how often an
epoch has a row comes from the data set alone, and the sums are compared with what the root counted
while the contributions came in.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from phalanx.errors import DataLoss
from phalanx.specs.balance import by_class, drawn_rows
from phalanx.texts import number_of
from phalanx.training.leaf import Chunks, leaf_rows
from phalanx.training.replay import ReplayLog
from phalanx.training.sampler import RowSelection
from phalanx.training.two_rounds import row_shards
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import JobPlan

Contribution = tuple[int, int]
"""(shard, step): what a shard gave to one of its steps."""

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Books:
    """What the durable record of a job says of its committed steps.

    Attributes:
        completed: by shard, the steps that it has completed.
        examples: how many the root has counted; None: it is not known any more.
        lost: how many the root has missed.
        doubled: how many the root has counted twice.
        applied: how often each contribution was applied; None: no log says so, and each step that
            a shard has completed stands for one.
        left_out: contributions that did not enter their step.
        all_named: nothing was left out but those.
    """

    completed: tuple[int, ...]
    examples: int | None
    lost: int = 0
    doubled: int = 0
    applied: Mapping[Contribution, int] | None = None
    left_out: frozenset[Contribution] = frozenset()
    all_named: bool = False


@dataclass(frozen=True)
class LeftOut:
    """A contribution that did not enter its step, and how many examples it had.

    Steps of the shard are counted from 1 here, as wherever a person is told of them.
    """

    shard: int
    step: int
    examples: int


@dataclass(frozen=True)
class Ledger:
    """How often examples were used.

    Attributes:
        epochs: epochs that all shards have been through.
        exact_epochs: those of them in which each example was used exactly as often as it is there.
        epoch_examples: examples of an epoch, those that come again included.
        used: examples that entered the steps, over all epochs.
        left_out: examples whose contribution was left out of its step, as the spec allows.
        doubled: examples used more often in an epoch than it has them.
        missing: examples of whole epochs that were neither used nor left out.
        named: the contributions that were left out, as far as they are known.
        problems: what does not balance, in words; empty where all does.
    """

    epochs: int
    exact_epochs: int
    epoch_examples: int
    used: int
    left_out: int
    doubled: int
    missing: int
    named: tuple[LeftOut, ...]
    problems: tuple[str, ...]

    @property
    def balanced(self) -> bool:
        """Whether every example is accounted for, and none was used twice."""
        return not self.problems

    def to_json(self) -> dict[str, object]:
        """Return it as a part of the JSON of ``phalanx verify``."""
        return {
            "balanced": self.balanced,
            "epochs": self.epochs,
            "exact_epochs": self.exact_epochs,
            "epoch_examples": self.epoch_examples,
            "used": self.used,
            "left_out": self.left_out,
            "doubled": self.doubled,
            "missing": self.missing,
            "contributions_left_out": [
                {"shard": each.shard, "step": each.step, "examples": each.examples}
                for each in self.named
            ],
            "problems": list(self.problems),
        }


def applied_by(log: ReplayLog, shards: int) -> Counter[Contribution]:
    """Return how often each contribution was applied, by the order that a log tells.

    A shard computes a step once its step before has committed. So the step of a contribution is how
    many of the shard's had committed in the version that it has read, whatever committed since: a
    second contribution to a step has read a version without the first. Raises DataLoss for a
    commit that cannot be.
    """
    numbers: list[list[int]] = [[] for _ in range(shards)]
    applied: Counter[Contribution] = Counter()
    for number in range(len(log)):
        shard, read = log.commit(number)
        if not (0 <= shard < shards and 0 <= read <= number):
            raise DataLoss(
                f"commit {number} of the replay log is one of shard {shard}, made with version "
                f"{read}; there is no such one among {number_of(shards, 'shard')}"
            )
        applied[shard, bisect_left(numbers[shard], read)] += 1
        numbers[shard].append(number)
    return applied


def take_stock(plan: JobPlan, split: Chunks, books: Books) -> Ledger:
    """Count how often each row of the split was used.

    Args:
        plan: the job's plan.
        split: the chunks that it trained on.
        books: what is written of it.
    """
    return _Stock(plan, split, books).ledger()


@dataclass
class _Epoch:
    """Rows of one epoch: how often each was used, and was in a contribution that was left out."""

    used: Counts
    left_out: Counts


class _Stock:
    """The counting of one job; its epochs count the shards' own steps."""

    def __init__(self, plan: JobPlan, split: Chunks, books: Books) -> None:
        self._plan = plan
        self._split = split
        self._books = books
        #: Own steps of a shard in a step of the job, and in an epoch.
        self._own = max(1, plan.local_steps)
        self._per_epoch = max(1, plan.steps_per_epoch)
        self._rows = _Rows(plan, split)
        self._named: Counter[Contribution] = Counter()

    def ledger(self) -> Ledger:
        whole = min(self._books.completed) * self._own // self._per_epoch
        used = left_out = doubled = missing = exact = 0
        for number in range(-(-self._last * self._own // self._per_epoch)):
            epoch = self._count(number)
            used += int(epoch.used.sum())
            left_out += int(epoch.left_out.sum())
            doubled += int(np.maximum(epoch.used + epoch.left_out - self._rows.wanted, 0).sum())
            if number < whole:
                absent = self._rows.wanted - epoch.used - epoch.left_out
                missing += int(np.maximum(absent, 0).sum())
                exact += bool((epoch.used == self._rows.wanted).all())
        unnamed = 0
        if not self._books.all_named:
            # Their rows were counted as used: nobody knows which they are.
            unnamed = min(max(self._books.lost - left_out, 0), used)
        ledger = Ledger(
            epochs=whole,
            exact_epochs=0 if unnamed else exact,
            epoch_examples=int(self._rows.wanted.sum()),
            used=used - unnamed,
            left_out=left_out + unnamed,
            doubled=doubled,
            missing=missing,
            named=tuple(
                LeftOut(shard, step + 1, examples)
                for (shard, step), examples in sorted(self._named.items(), key=_by_step)
                if examples
            ),
            problems=(),
        )
        return replace(ledger, problems=tuple(self._problems(ledger)))

    @property
    def _last(self) -> int:
        """A step of the job that nothing was committed to, nor to any later one."""
        steps = [step + 1 for _, step in self._books.applied or ()]
        return max(*self._books.completed, *steps, 0)

    def _count(self, epoch: int) -> _Epoch:
        counts = _Epoch(np.zeros_like(self._rows.wanted), np.zeros_like(self._rows.wanted))
        # Shard by shard: the sampler remembers the order of a few shards at a time.
        for shard in range(row_shards(self._plan)):
            for own_step in range(epoch * self._per_epoch, (epoch + 1) * self._per_epoch):
                contribution = shard, own_step // self._own
                times = self._times(contribution)
                if not times:
                    continue
                rows = leaf_rows(self._plan, self._split, shard, own_step)
                out = contribution in self._books.left_out
                total = self._rows.add(counts.left_out if out else counts.used, rows, times)
                if out:
                    self._named[contribution] += total
        return counts

    def _times(self, contribution: Contribution) -> int:
        """How often a contribution was applied, or left out."""
        if self._books.applied is not None:
            return self._books.applied.get(contribution, 0)
        shard, step = contribution
        return int(step < self._books.completed[shard])

    def _problems(self, ledger: Ledger) -> Iterator[str]:
        books = self._books
        if ledger.doubled:
            yield f"{number_of(ledger.doubled, 'example')} used more often than an epoch has them"
        if ledger.missing:
            yield f"{number_of(ledger.missing, 'example')} of whole epochs not used"
        if ledger.epoch_examples != self._plan.train_rows:
            yield (
                f"an epoch has {number_of(ledger.epoch_examples, 'example')}, and the job was "
                f"planned for {self._plan.train_rows}"
            )
        yield from self._off_the_clocks()
        if ledger.left_out != books.lost:
            yield (
                f"{number_of(ledger.left_out, 'example')} left out, and the root has missed "
                f"{books.lost}"
            )
        if books.examples not in (None, ledger.used):
            yield f"{number_of(ledger.used, 'example')} used, and the root counted {books.examples}"
        if books.doubled:
            yield f"the root counted {number_of(books.doubled, 'example')} twice"

    def _off_the_clocks(self) -> Iterator[str]:
        """Shards that the log and the checkpoint tell different steps of."""
        if self._books.applied is None:
            return
        logged: Counter[int] = Counter()
        for (shard, _), times in self._books.applied.items():
            logged[shard] += times
        for shard, steps in enumerate(self._books.completed):
            if logged[shard] != steps:
                yield (
                    f"shard {shard} has completed {number_of(steps, 'step')}, and the log has "
                    f"{number_of(logged[shard], 'contribution')} of it"
                )


class _Rows:
    """The rows of a split as places in one vector.

    ``wanted`` says how often an epoch has each.
    """

    def __init__(self, plan: JobPlan, split: Chunks) -> None:
        data = JobSpec.FromString(plan.spec).data
        #: First place of each chunk, or of each chunk in each class.
        self._firsts: Counts
        if not by_class(data):
            self._firsts = _firsts(np.array([split.chunk_rows], np.int64))
            self.wanted: Counts = np.ones(sum(split.chunk_rows), np.int64)
            return
        classes = np.array([chunk.class_rows for chunk in split.chunks], np.int64).T
        stored = classes.sum(axis=1)
        self._firsts = _firsts(classes)
        drawn = drawn_rows(stored.tolist(), oversample=data.HasField("oversample"))
        self.wanted = np.concatenate(
            [
                times // rows + (np.arange(rows) < times % rows)
                for rows, times in zip(stored.tolist(), drawn, strict=True)
                if rows
            ]
        )

    def add(self, counts: Counts, selections: list[RowSelection], times: int) -> int:
        """Count rows so many times; returns how many that were."""
        total = 0
        for selection in selections:
            first = self._firsts[selection.label or 0, selection.chunk_index]
            np.add.at(counts, first + selection.rows, times)
            total += times * len(selection.rows)
        return total


def _firsts(rows: Counts) -> Counts:
    """Where each entry begins if all stand one after another, row of the matrix by row."""
    ends: Counts = rows.cumsum().reshape(rows.shape)
    return ends - rows


def _by_step(named: tuple[Contribution, int]) -> tuple[int, int]:
    (shard, step), _ = named
    return step, shard
