"""What the owner of range 0 of an all-reduce job decides for all members, in one term.

It runs the same decisions as the root of a parameter server. Their state travels with each go
record, so that every member has it and any of them can be the root of the next term.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from phalanx.errors import DataLoss
from phalanx.training.decisions import RootDecider
from phalanx.training.expected import expected_examples
from phalanx.v1 import training_pb2
from phalanx.v1.training_pb2 import GoRecord
from worker.core.all_reduce.replica import Replica

TERMINAL_ACTIONS = (GoRecord.ACTION_PAUSE, GoRecord.ACTION_STOP, GoRecord.ACTION_FAIL)


class Root:
    """Go records of one term, and which checkpoints are complete. Times are since it began."""

    def __init__(self, plan: training_pb2.JobPlan, term: int, members: Collection[str]) -> None:
        self.decider = RootDecider(plan, term)
        self.examples_lost = 0
        self.examples_doubled = 0
        self._plan = plan
        self._members = frozenset(members)
        #: The checkpoint under way, and what members say that they hold at its version.
        self._checkpoint: GoRecord | None = None
        self._owed = False
        self._hashes: dict[str, str] = {}

    def initialise(self) -> GoRecord:
        """The first record of a job of which no member and no checkpoint has anything."""
        return self.decider.start()

    def begin(self, replica: Replica, elapsed_s: float) -> GoRecord:
        """The first record of the term, at the version that all members hold by now.

        Raises `DataLoss` where the state that came with the version cannot be read.
        """
        record = replica.record
        if record is None:
            return self._issue(self.decider.initialised(elapsed_s))
        try:
            state = json.loads(record.root_state)
            self.examples_lost = int(state.get("examples_lost", 0))
            self.examples_doubled = int(state.get("examples_doubled", 0))
            go = self.decider.restore(record.version, record.root_state)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataLoss(
                f"the state of range 0 at step {record.version} cannot be read: {error!r}"
            ) from None
        if record.version == replica.version:
            return self._issue(go)
        return self.committed(replica, elapsed_s)

    def committed(self, replica: Replica, elapsed_s: float) -> GoRecord:
        """A step is done: every member has all of its gradient, or will before it goes on."""
        expected = expected_examples(self._plan, replica.version - 1)
        self.examples_lost += max(expected - replica.count, 0)
        self.examples_doubled += max(replica.count - expected, 0)
        go = self.decider.committed(replica.version, replica.count, replica.loss, elapsed_s)
        return self._issue(go)

    def evaluated(self, sums: list[float], example_count: int, elapsed_s: float) -> GoRecord:
        """The evaluation at the version is done."""
        return self._issue(self.decider.evaluated(sums, example_count, elapsed_s))

    def _issue(self, go: GoRecord) -> GoRecord:
        terminal = go.action in TERMINAL_ACTIONS
        if not terminal and (go.checkpoint or self._owed):
            # One at a time: a slow checkpoint delays the next one, never the step.
            wanted = go.checkpoint or go.action == GoRecord.ACTION_TRAIN
            go.checkpoint = wanted and self._checkpoint is None
            self._owed = not go.checkpoint
        if go.checkpoint:
            self._checkpoint, self._hashes = go, {}
        go.root_state = self._state(go)
        return go

    # -- checkpoints

    def hashed(self, member: str, version: int, sha256: str) -> GoRecord | None:
        """What a member holds at the version of the checkpoint; the record of the checkpoint once
        all have said it."""
        go = self._checkpoint
        if go is None or go.version != version or member not in self._members:
            return None
        before = len(self._hashes)
        self._hashes[member] = sha256
        return go if before < len(self._hashes) == len(self._members) else None

    @property
    def disagreement(self) -> str:
        """Which members hold what, if they do not all hold the same; empty if they do."""
        if len(set(self._hashes.values())) < 2:
            return ""
        return ", ".join(f"{name} {self._hashes[name]}" for name in sorted(self._hashes))

    def checkpoint_done(self, version: int) -> None:
        """The checkpoint is complete, or given up: the next may come."""
        if self._checkpoint is not None and self._checkpoint.version == version:
            self._checkpoint = None

    def _state(self, go: GoRecord) -> str:
        """What another root, or a checkpoint, needs of this one, as JSON; at the end with the
        reason of that, since the report that says so may be lost."""
        state: dict[str, Any] = json.loads(self.decider.state())
        state["examples_lost"] = self.examples_lost
        state["examples_doubled"] = self.examples_doubled
        if go.action == GoRecord.ACTION_STOP:
            state["stop_reason"] = go.reason
        return json.dumps(state, sort_keys=True)
