"""What the worker decides about a job whose nodes have a state: `JobCore`, and the states.

A part runs only on the state of its node at the round's version, and makes the next one. States
that are not here, of nodes that the worker has taken over, are made first (`Rebuild`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from phalanx.training.states import base_of, hands_in, vectors_of
from phalanx.v1 import aggregation_service_pb2, training_pb2
from phalanx.v1 import coordination_service_pb2 as coordination
from worker.core.dispatch import Dispatcher, Task
from worker.core.effects import Effect
from worker.core.job import JobCore
from worker.core.outbox import FrameOut, GoOut, RecallOut, StartsOut
from worker.core.rebuild import Rebuild, RecalledPlace
from worker.core.rounds import Part, PartState, Round
from worker.core.states import States
from worker.core.versions import Place

GoRecord = training_pb2.GoRecord


class StatefulJobCore(JobCore):
    """One job whose nodes have a state; see the module's text."""

    def __init__(
        self, plan: training_pb2.JobPlan, dispatcher: Dispatcher, new_task_id: Callable[[], int]
    ) -> None:
        super().__init__(plan, dispatcher, new_task_id)
        self._states = States(self._buffers)
        self._rebuild: Rebuild | None = None

    def leave(self) -> list[Effect]:
        """See `JobCore.leave`."""
        return super().leave() + self._end_states()

    def frame_place(self, frame: aggregation_service_pb2.VersionFrame) -> Place | None:
        """See `JobCore.frame_place`."""
        if self._rebuild is not None and frame.term == self.term:
            recalled = self._rebuild.place(frame)
            if recalled is not None:
                return recalled
        return super().frame_place(frame)

    def frame_stored(self, place: Place) -> list[Effect]:
        """See `JobCore.frame_stored`."""
        if not isinstance(place, RecalledPlace):
            return super().frame_stored(place)
        rebuild = self._rebuild
        if rebuild is None:
            return []
        round = rebuild.stored(place)
        if round is not None:
            return self._submit(round, round.owe(rebuild.nodes))
        return self._states_made(rebuild) if rebuild.idle else []

    def stream_opened(self, aggregator_id: str) -> list[Effect]:
        """See `JobCore.stream_opened`."""
        if self._rebuild is not None:
            self._rebuild.stream_opened(aggregator_id)
        return super().stream_opened(aggregator_id)

    def next_message(self, aggregator_id: str) -> FrameOut | GoOut | StartsOut | RecallOut | None:
        """See `JobCore.next_message`."""
        if self._rebuild is not None and self._outbox.is_open(aggregator_id):
            recall = self._rebuild.next_message(aggregator_id)
            if recall is not None:
                return recall
        return super().next_message(aggregator_id)

    def part_done(
        self, task: Task, part: Part, count: int, loss: float, mask: int, sums: tuple[float, ...]
    ) -> list[Effect]:
        """See `JobCore.part_done`; the next state is there with it."""
        round, rebuild = task.round, self._rebuild
        if self._wants(round) and part.next_state:
            version = round.go.version + 1
            part.made_state = self._states.put(part.node, version, part.next_state)
            part.next_state = ()
        effects = super().part_done(task, part, count, loss, mask, sums)
        if rebuild is None or round is not rebuild.round:
            return effects
        ended = rebuild.end_step()
        return self._end_tasks(ended) + self._states_made(rebuild) if ended is not None else []

    # Inside

    def _start_term(self, message: coordination.AssignJob) -> list[Effect]:
        ended = self._end_states()
        effects = super()._start_term(message)
        itemsize = np.dtype(message.plan.layout.dtype or "float32").itemsize
        self._rebuild = Rebuild(
            message.plan,
            message.term,
            message.ranges,
            itemsize,
            self._dispatcher.slots,
            self._states,
            self._buffers,
        )
        return ended + effects

    def _round_of(self, go: GoRecord) -> Round:
        round = super()._round_of(go)
        if go.action == GoRecord.ACTION_TRAIN:
            round.hands_in = hands_in(self.plan, go.version + 1)
            self._states.forget_before(go.version, base_of(self.plan, go.version))
        return round

    def _other_rounds(self) -> list[Round]:
        round = self._rebuild.round if self._rebuild is not None else None
        return [round] if round is not None else []

    def _owe(self, round: Round) -> list[Effect]:
        rebuild = self._rebuild
        # Control wants what failed tried again.
        ended = self._abandon(rebuild) if rebuild is not None and rebuild.failed else []
        return ended + super()._owe(round)

    def _submit(self, round: Round, parts: Iterable[Part]) -> list[Effect]:
        """Have parts computed whose states are here, and the states made of the others."""
        rebuild = self._rebuild
        if rebuild is None or round.go.action != GoRecord.ACTION_TRAIN:
            return super()._submit(round, parts)
        if round is rebuild.round:
            self._queue(round, self._with_states(round, parts), rebuild.parameters)
            return []
        buffer = self.versions.buffer_of(round.go.version)
        self._queue(round, self._with_states(round, parts), buffer)
        rebuild.want(round.go.version, (part.node for part in self._waiting(round)))
        return self._go_on(rebuild)

    def _with_states(self, round: Round, parts: Iterable[Part]) -> list[Part]:
        """Those of the parts whose states are here, each with buffers for the next one."""
        found = []
        for part in parts:
            state = self._states.find(part.node, round.go.version)
            if state is None:
                continue
            part.read_state = state
            if not part.next_state:
                count = vectors_of(self.plan, part.node)
                part.next_state = tuple(self._buffers.take() for _ in range(count))
            found.append(part)
        return found

    def _waiting(self, round: Round) -> list[Part]:
        """Parts that nobody was given: their states are not here."""
        given = {part for task in self._tasks.values() for part in task.parts}
        pending = [part for part in round.parts.values() if part.state is PartState.PENDING]
        return [part for part in pending if part not in given]

    def _states_made(self, rebuild: Rebuild) -> list[Effect]:
        """Run what waited for the states that are here now, and make those that are not."""
        self._states.forget_before(rebuild.target, base_of(self.plan, rebuild.target))
        round = self.round
        if round is not None and round.go.action == GoRecord.ACTION_TRAIN:
            return self._submit(round, self._waiting(round))
        return self._go_on(rebuild)

    def _go_on(self, rebuild: Rebuild) -> list[Effect]:
        effects = self._abandon(rebuild) if rebuild.leads_nowhere else []
        return effects + self._wake() if rebuild.advance() else effects

    def _abandon(self, rebuild: Rebuild) -> list[Effect]:
        ended = rebuild.abandon()
        return self._end_tasks(ended) if ended is not None else []

    def _end_states(self) -> list[Effect]:
        effects = self._abandon(self._rebuild) if self._rebuild is not None else []
        self._states.clear()
        return effects


def make_job(
    plan: training_pb2.JobPlan, dispatcher: Dispatcher, new_task_id: Callable[[], int]
) -> JobCore:
    """Return the decisions about a job, of whichever kind it needs."""
    kind = StatefulJobCore if plan.state_every else JobCore
    return kind(plan, dispatcher, new_task_id)
