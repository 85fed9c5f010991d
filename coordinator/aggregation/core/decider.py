"""What the owner of range 0 asks about the course of the job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from phalanx.v1.training_pb2 import GoRecord


class Decider(Protocol):
    """Pure decisions on what follows at each version; each answer is the next go record.

    Versions and rounds of the answers rise strictly; `elapsed_s` is the time since the ranges were
    assigned and matters to wall-time stops and timed checkpoints only.
    """

    def start(self) -> GoRecord:
        """A fresh job: make version 0."""
        ...

    def restore(self, version: int, root_state: str) -> GoRecord:
        """Continue at a checkpoint's version with the state that it holds."""
        ...

    def initialised(self, elapsed_s: float) -> GoRecord:
        """Version 0 is whole in range 0."""
        ...

    def committed(
        self, version: int, example_count: int, loss_sum: float, elapsed_s: float
    ) -> GoRecord:
        """A train round made `version` in range 0."""
        ...

    def evaluated(
        self, sums: NDArray[np.float64], example_count: int, elapsed_s: float
    ) -> GoRecord:
        """The evaluation round at the current version is complete."""
        ...

    def request_pause(self) -> None:
        """Pause at the next boundary."""
        ...

    def interrupt(self, elapsed_s: float) -> GoRecord:
        """Pause now, at the current version, instead of the open round."""
        ...

    def fail(self, reason: str) -> GoRecord:
        """End as failed now, whatever is open."""
        ...

    def state(self) -> str:
        """JSON for the checkpoint of the current version."""
        ...

    def take_metrics(self) -> Mapping[str, float]:
        """Values that became known with the last answer; each is handed out once."""
        ...
