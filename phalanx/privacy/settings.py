"""What the spec of a private job comes to, given how many rows it trains on."""

from __future__ import annotations

from phalanx.privacy.accountant import Accountant
from phalanx.v1.job_spec_pb2 import JobSpec, Train
from phalanx.v1.training_pb2 import JobPlan


def is_private(train: Train) -> bool:
    """Whether the job protects its rows."""
    return train.HasField("privacy")


def expected_batch(train: Train, rows: int) -> int:
    """Return how many rows a step is expected to have."""
    return max(1, min(train.batch_size or rows, rows))


def sampling_rate(train: Train, rows: int) -> float:
    """Return the probability with which a row enters a step."""
    return expected_batch(train, rows) / max(1, rows)


def steps_per_epoch(train: Train, rows: int) -> int:
    """Return the steps in which each row is used once, on average."""
    return max(1, round(rows / expected_batch(train, rows)))


def accountant(train: Train, rows: int) -> Accountant:
    """Return what tells how much privacy the job spends."""
    privacy = train.privacy
    return Accountant(sampling_rate(train, rows), privacy.noise_multiplier, privacy.delta)


def steps_allowed(train: Train, rows: int) -> int | None:
    """Return the steps that `max_epsilon` allows; None: it is not given."""
    if not train.privacy.HasField("max_epsilon"):
        return None
    return accountant(train, rows).steps_within(train.privacy.max_epsilon)


class Spending:
    """How much privacy a planned job has spent after each of its steps."""

    def __init__(self, plan: JobPlan) -> None:
        train = JobSpec.FromString(plan.spec).train
        self._accountant = accountant(train, plan.train_rows) if is_private(train) else None
        #: Steps after which the next one would exceed `max_epsilon`; 0: no such bound.
        self.steps = steps_allowed(train, plan.train_rows) or 0

    @property
    def counted(self) -> bool:
        """Whether the job is private."""
        return self._accountant is not None

    def epsilon(self, steps: int) -> float:
        """Return ε after so many steps."""
        return 0.0 if self._accountant is None else self._accountant.epsilon(steps)
