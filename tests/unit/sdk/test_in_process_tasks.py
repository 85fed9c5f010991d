"""What a task comes to in the process itself: as on a cluster."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from phalanx.errors import FailedPrecondition
from phalanx.sdk.in_process_tasks import run_task
from phalanx.v1.task_service_pb2 import TaskResult


def raising(*said: Exception | None) -> Callable[[int, TaskResult], None]:
    left = list(said)

    def call(task: int, result: TaskResult) -> None:
        error = left.pop(0)
        if error is not None:
            raise error
        result.value_json = str(task)

    return call


NO_GPU = FailedPrecondition("the job asks for a GPU, and there is none", reason="NO_GPU")
OWN = FailedPrecondition("a code of mine", reason="RESULTS_NOT_JOURNALLED")


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ((NO_GPU, NO_GPU), "NO_GPU"),
        ((NO_GPU, ValueError("no")), "POISON_TASK"),
        ((ValueError("no"), NO_GPU), "POISON_TASK"),
        ((OWN, OWN), "POISON_TASK"),
    ],
)
def test_a_task_that_fails_for_a_reason_of_its_model_tells_it(
    said: tuple[Exception, ...], code: str
) -> None:
    result = run_task(raising(*said), 3, len(said))
    assert (result.failure.code, result.failure.attempts) == (code, len(said))


def test_a_task_that_gets_through_at_its_second_try_has_no_failure() -> None:
    result = run_task(raising(ValueError("no"), None), 3, 3)
    assert (result.value_json, result.attempt) == ("3", 2)
    assert not result.HasField("failure")
