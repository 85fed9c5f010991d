"""The ranges of a job each of whose steps is two train rounds, which make two versions.

See `phalanx.training.two_rounds`. The root decides at the versions of steps alone. The record of
the second round follows from the end of the first, so nothing happens between the two: no pause,
no checkpoint, no evaluation. Whoever dies in between costs what it costs in any round.
"""

from __future__ import annotations

from dataclasses import replace

from coordinator.aggregation.core.effects import Effect, StartCheckpoint
from coordinator.aggregation.core.machine import JobRanges, _Range
from coordinator.aggregation.core.plan import AnyRound
from coordinator.aggregation.core.verified import VerifiedRanges
from coordinator.aggregation.core.versions import NONE
from phalanx.training.two_rounds import rounds_per_step, step_of
from phalanx.v1.training_pb2 import GoRecord


class TwoRoundRanges(JobRanges):
    """`JobRanges` of such a job, which has one range; see the module's text."""

    @property
    def version(self) -> int:
        """Steps of the job that are done; -1: not even the parameters to begin with."""
        version = super().version
        return NONE if version < 0 else self.step_of(version)

    def step_of(self, version: int) -> int:
        """See `JobRanges.step_of`."""
        return step_of(self.plan, version)

    def _version_of(self, step: int) -> int:
        return step * rounds_per_step(self.plan)

    def _is_within_step(self, version: int) -> bool:
        return version != NONE and version % rounds_per_step(self.plan) != 0

    def _waits_for_a_step(self) -> bool:
        within = any(self._is_within_step(owned.version) for owned in self._ranges.values())
        return not within and super()._waits_for_a_step()

    def _close(self, owned: _Range, current: AnyRound, elapsed_s: float) -> list[Effect]:
        following = current.spec.version + 1
        trained = current.spec.action == GoRecord.ACTION_TRAIN
        if not (trained and self._is_within_step(following)):
            return super()._close(owned, current, elapsed_s)
        owned.round = owned.root = owned.work = None
        go = GoRecord()
        go.CopyFrom(self._go_log.newest)
        go.version, go.round, go.checkpoint = following, 0, False
        return self._put_in_force(go)

    def _put_in_force(self, go: GoRecord) -> list[Effect]:
        key = self._ranges[0].key
        if go.action == GoRecord.ACTION_FAIL and (go.version, go.round) <= key:
            # The step that it is about is under way.
            go.version, go.round = key[0], key[1] + 1
        return super()._put_in_force(go)

    def _settle_checkpoint(self, go: GoRecord) -> None:
        """What is owed waits for the step's end."""
        if not self._is_within_step(go.version):
            super()._settle_checkpoint(go)

    def _checkpoint(self, owned: _Range, go: GoRecord) -> list[Effect]:
        effects: list[Effect] = []
        for effect in super()._checkpoint(owned, go):
            assert isinstance(effect, StartCheckpoint)
            step = effect.snapshot.version = self.step_of(go.version)
            effects.append(replace(effect, version=step))
        return effects

    def _end(self, owned: _Range, go: GoRecord) -> list[Effect]:
        told = GoRecord()
        told.CopyFrom(go)
        told.version = self.step_of(go.version)
        return super()._end(owned, told)


class VerifiedTwoRoundRanges(TwoRoundRanges, VerifiedRanges):
    """The same where contributions are verified, in both rounds."""
