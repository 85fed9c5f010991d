"""Planted bugs in what jobs have besides gradients: versions that an update makes, and tasks."""

from __future__ import annotations

from tests.simulation.planted import COUNT_LOST_TASKS
from tests.simulation.planting import one

_AGGREGATION = "coordinator.aggregation"
_CONTROL = "coordinator.control"
_TWO_ROUNDS = f"{_AGGREGATION}.core.two_rounds:TwoRoundRanges"
_NEEDS = f"{_AGGREGATION}.core.dispatch.needs:Needs"
_TASKS = f"{_AGGREGATION}.core.dispatch.dispatcher:Dispatcher"

MUTANTS_OF_WORK = (
    # Versions that no elementwise optimizer makes
    one(
        "an update does not wait for the last sums", 1,
        f"{_AGGREGATION}.core.roots:UpdateRoot.frame_complete",
        "if len(self._sums) < len(parameters.grid):",
        "if len(self._sums) < len(parameters.grid) - 1:",
    ),
    one(
        "what a job keeps for itself becomes its model", 9,
        f"{_CONTROL}.model_writer:ModelWriter.write",
        "layout = model_layout(facts.plan.layout)", "layout = facts.plan.layout",
    ),
    one(
        "each round of a step counts as one after a roll-back", 3, f"{_TWO_ROUNDS}._version_of",
        "return step * rounds_per_step(self.plan)", "return step",
    ),
    one(
        "a checkpoint that is owed is made between the rounds of a step", 9,
        f"{_TWO_ROUNDS}._settle_checkpoint", "if not self._is_within_step(go.version):", "if True:",
    ),
    # Programs
    one(
        "a task begins before what it reads is durable", 0, f"{_TASKS}._settle_task",
        "self._unwritten.add_result(result)",
        "self._unwritten.add_result(result)\n    self._unblock(self._needs.done(result)[0])",
    ),
    one(
        "what a task reads comes in the order in which it was done", 5, f"{_NEEDS}.inputs",
        "for each in needs[task])", "for each in self._values if each in needs[task])",
    ),
    one(
        "whoever takes over does not know what was stored before", 0, f"{_TASKS}._end",
        "self._unblock(ready)", "self._unblock(ready if self._ticked_s is not None else [])",
    ),
    one(
        "nothing is passed over", 0, "phalanx.programs.base:Graph.passed",
        "if task not in self.passing or values[self.needs[task][-1]].size_bytes:", "if True:",
    ),
    one(
        "a task that runs again reads nothing", 0, "worker.core.calls:TaskSetCore._submit",
        "self._inputs.get(attempt, ())", "self._inputs.pop(attempt, ())",
    ),
    one(
        "what tasks read is numbered anew where a message is cut", 0,
        f"{_AGGREGATION}.tasks:_messages", "WorkResponse(first_attempt=attempt), 0",
        "WorkResponse(first_attempt=effect.first_attempt), 0",
    ),
    one(
        "a task goes on from what another has kept", 0, f"{_NEEDS}._take_beside",
        "self._earlier[user] = self._kept[earlier]",
        "self._earlier[user] = self._kept[min(self._kept)]",
    ),
    one(
        "what tasks keep for each other outlives their job", 0,
        f"{_CONTROL}.operations:Operations.release_pins",
        "await release_kept(self._store, job_id)", "pass",
    ),
    # Sets of tasks
    one(
        "what came of a task is settled before it is durable", 0, f"{_TASKS}._succeeded",
        "self._settle_task(result)",
        "self._settle_task(result)\n    self._settled(report.attempt)",
    ),
    one(
        "whoever comes back with a task that is done does it again", 5, f"{_TASKS}._take_back",
        "or self._state[held.task] >= State.REPORTED", "",
    ),
    one(
        "an owner that was replaced takes its results for stored", 2,
        f"{_AGGREGATION}.task_journal:TaskJournal.append",
        "if [each.payload async for each in found] != [payload]:", "if False:",
    ),
    one(
        "attempts are numbered anew in every term", 2, f"{_TASKS}.begin",
        "self._numbers = (self.term << TERM_SHIFT) + (self._begun << BEGUN_SHIFT)",
        "self._numbers = 0",
    ),
    one(
        "tasks of a stream that broke stay with it", 0, f"{_TASKS}._closed",
        'self._run_again(freed, peer.worker_id, "lost")', "pass",
    ),
    one(
        "the death of a worker is a try of its tasks", 8, f"{_TASKS}._closed",
        "self._run_again(", COUNT_LOST_TASKS,
    ),
)  # fmt: skip
