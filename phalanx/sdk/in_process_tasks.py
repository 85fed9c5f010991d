"""Independent tasks in this very process, one after another."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from pathlib import Path

from phalanx.errors import FailedPrecondition
from phalanx.model_failures import common, reason_of
from phalanx.tasks import failures_max
from phalanx.texts import number_of
from phalanx.v1.job_pb2 import Failure
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.task_service_pb2 import TaskResult
from phalanx.v1.training_pb2 import JobPlan

IN_PROCESS = "in-process"


class TaskFailed(FailedPrecondition):
    """More tasks were given up than the job allows; `failure` is the last one's."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message, reason=failure.code)
        self.failure = failure


def run_tasks(
    plan: JobPlan,
    code_dir: Path | None,
    results: dict[int, TaskResult],
    on_result: Callable[[], None],
) -> None:
    """Run what has no result yet and add it to `results`; `on_result` is called after each.

    What `on_result` raises ends it. Raises TaskFailed, and whatever loading the function raises.
    """
    from phalanx.calls import CallWork

    spec = JobSpec.FromString(plan.spec)
    work, limit = CallWork(plan, code_dir), failures_max(spec)
    work.describe()

    def returned(task: int, result: TaskResult) -> None:
        result.value_json = work.call(task).decode()

    for task in range(len(spec.tasks.arguments)):
        if task not in results:
            results[task] = result = run_task(returned, task, spec.tasks.attempts)
            given_up = sum(each.HasField("failure") for each in results.values())
            if limit is not None and given_up > limit:
                raise TaskFailed(result.failure)
            on_result()


def run_task(call: Callable[[int, TaskResult], None], task: int, attempts: int) -> TaskResult:
    """Return the result of a task that `call` fills in, or its failure after so many attempts."""
    result = TaskResult(task=task, worker_id=IN_PROCESS)
    reasons: list[str] = []
    for attempt in range(1, attempts + 1):
        result.attempt = attempt
        began_s = time.perf_counter()
        try:
            call(task, result)
        except BaseException as error:  # noqa: BLE001 - user code raises what it likes
            text = f"{type(error).__name__}: {error}"
            reasons.append(reason_of(error))
            result.failure.CopyFrom(
                Failure(
                    code=common(reasons) or "POISON_TASK",
                    message=f"task {task} failed {number_of(attempt, 'time')}: {text}",
                    shard=-1,
                    attempts=attempt,
                    worker_ids=[IN_PROCESS],
                    traceback="".join(traceback.format_exception(error)),
                    task=task,
                )
            )
        result.seconds = result.round_trip_s = time.perf_counter() - began_s
        if not result.HasField("failure"):
            break
    return result
