"""The ranges of a job whose steps do without their slowest shards.

Which shards these are depends on who is slow, so it is written down: each checkpoint says what
every step up to it has left out, and whoever computes the job again leaves out the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from coordinator.aggregation.core.effects import Effect, StartCheckpoint
from coordinator.aggregation.core.machine import JobRanges, _Range
from coordinator.aggregation.core.plan import AnyRound
from coordinator.aggregation.core.state import AnyRule, Array
from phalanx.training.decisions import RootDecider
from phalanx.training.left_out import COUNTS, LeftOutLog
from phalanx.v1 import training_pb2
from phalanx.v1.training_pb2 import GoRecord


class BackupRanges(JobRanges):
    """`JobRanges` of a job with backup shards, which has one range; see the module's text."""

    def __init__(
        self,
        plan: training_pb2.JobPlan,
        term: int,
        owned: Sequence[training_pb2.ParameterRange],
        optimizer: AnyRule,
        decider: RootDecider | None,
    ) -> None:
        super().__init__(plan, term, owned, optimizer, decider)
        #: None: the job began where nobody wrote it down.
        self._log: LeftOutLog | None = LeftOutLog()

    def begin_restored(
        self,
        version: int,
        vectors: Mapping[int, tuple[Array, Mapping[str, Array]]],
        root_state: str,
    ) -> list[Effect]:
        """See `JobRanges.begin_restored`."""
        kept = vectors[0][1]
        self._log = LeftOutLog.restored(kept, version) if COUNTS in kept else None
        return super().begin_restored(version, vectors, root_state)

    def _close(self, owned: _Range, current: AnyRound, elapsed_s: float) -> list[Effect]:
        if self._log is not None and current.spec.action == GoRecord.ACTION_TRAIN:
            self._log.add(current.left_out)
        return super()._close(owned, current, elapsed_s)

    def _checkpoint(self, owned: _Range, go: GoRecord) -> list[Effect]:
        effects = super()._checkpoint(owned, go)
        for effect in effects:
            assert isinstance(effect, StartCheckpoint)
            if self._log is not None:
                log = self._log.vectors(effect.snapshot.dtype)
                pieces = {name: [vector] for name, vector in log.items()}
                effect.snapshot.extra = {**effect.snapshot.extra, **pieces}
        return effects
