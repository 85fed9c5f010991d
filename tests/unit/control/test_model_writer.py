"""What the last task of a program left is read by control, which survives whatever it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from coordinator.control import model_writer
from coordinator.control import store as control_store
from coordinator.control.core import effects as fx
from coordinator.control.core import events as ev
from coordinator.control.core.facts import Facts, JobFacts
from coordinator.control.operations import Operations
from phalanx.errors import DataLoss
from phalanx.programs import OUTCOME_BYTES_MAX, Outcome
from phalanx.tasks import OUTCOME
from phalanx.v1 import storage_service_pb2 as storage_pb
from phalanx.v1.control_journal_pb2 import JobSnapshot, JobSubmitted
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.task_service_pb2 import StoredValue

DIGEST = "ab" * 32


def document(**changes: Any) -> bytes:
    return json.dumps({"metrics": {}, "files": {}, **changes}).encode()


def with_model(layout: dict[str, Any], *pieces: list[Any]) -> bytes:
    return document(model={"layout": layout, "pieces": list(pieces)})


UNREADABLE = {
    "nothing": b"",
    "a list": b"[]",
    "lists within lists": b"[" * 200_000,
    "messages within messages": with_model({}).replace(b"{}", b'{"a":' * 5000 + b"1" + b"}" * 5000),
    "a number beyond floats": document(metrics={"a": 10**400}),
    "half a character in a metric": document(metrics={"\ud800": 1.0}),
    "half a character in a file": document(files={"\ud800": [DIGEST, 1]}),
    "half a character in a piece": with_model({}, ["\ud800", 0, 1]),
    "a piece at infinity": with_model({}, [DIGEST, float("inf"), 1]),
    "a piece beyond files": with_model({}, [DIGEST, 2**64, 1]),
    "a piece before files": with_model({}, [DIGEST, -1, 1]),
    "a file of less than nothing": document(files={"a": [DIGEST, -1]}),
    "a tensor of many dimensions": with_model({"tensors": [{"name": "w", "shape": [2] * 1000}]}),
    "a long name": with_model({"x" * 1_000_000: 1}),
    "more than is read": b" " * OUTCOME_BYTES_MAX + document(),
}


@pytest.mark.parametrize("data", UNREADABLE.values(), ids=UNREADABLE)
def test_what_is_no_outcome_is_refused_in_a_few_words(data: bytes) -> None:
    with pytest.raises(DataLoss) as refused:
        Outcome.from_json(data)
    assert len(refused.value.message) < 400


class Calls:
    """A storage with one blob, which comes in parts."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.given = 0
        self.cancelled = False

    def GetBlob(self, request: Any, **limits: Any) -> Any:
        calls = self

        class Call:
            async def __aiter__(self) -> AsyncIterator[storage_pb.GetBlobResponse]:
                for first in range(0, len(calls.content), 1024 * 1024):
                    chunk = calls.content[first : first + 1024 * 1024]
                    calls.given += len(chunk)
                    yield storage_pb.GetBlobResponse(chunk=chunk)

            def cancel(self) -> None:
                calls.cancelled = True

        return Call()


async def written(content: bytes, monkeypatch: pytest.MonkeyPatch) -> tuple[ev.Event, Calls]:
    """What comes of writing the outcome of a program whose last task left this."""
    store, calls = control_store.Store("127.0.0.1:1"), Calls(content)
    monkeypatch.setattr(store, "storage", calls)
    durable = Facts()
    spec = JobSpec(namespace="default")
    spec.evaluate.SetInParent()
    submitted = JobSubmitted(job_id="job-1", spec=spec)
    durable.jobs["job-1"] = JobFacts(JobSnapshot(submitted=submitted))
    root = json.dumps({"metrics": {}, OUTCOME: hashlib.sha256(content).hexdigest()})
    final = storage_pb.CheckpointManifest(job_id="job-1", step=3, final=True, root_state=root)
    try:
        effect = fx.WriteModel("job-1", 5, True, final)
        return await Operations(store, durable).perform(effect), calls
    finally:
        await store.close()


async def test_no_more_is_read_than_an_outcome_can_have(monkeypatch: pytest.MonkeyPatch) -> None:
    event, calls = await written(bytes(4 * OUTCOME_BYTES_MAX), monkeypatch)
    assert isinstance(event, ev.OperationFailed)
    assert event.code == "BLOB_TOO_LARGE"
    assert calls.cancelled
    assert calls.given <= OUTCOME_BYTES_MAX + 1024 * 1024


async def test_a_result_that_no_record_has_room_for_fails_its_job(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    event, _ = await written(document(metrics={"x" * (3 * 1024 * 1024): 1.0}), monkeypatch)
    assert isinstance(event, ev.OperationFailed)
    assert event.code == "OUTCOME_UNREADABLE"


async def test_an_outcome_that_nobody_thought_of_fails_its_job_and_no_leader(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Control would end by it again and again: each new leader writes the model first."""

    def refuse(*_: Any, **__: Any) -> None:
        raise LookupError("nobody thought of it")

    monkeypatch.setattr(model_writer.Outcome, "from_json", refuse)
    event, _ = await written(document(), monkeypatch)
    assert isinstance(event, ev.OperationFailed)
    assert event.code == "INTERNAL"
    assert "LookupError" in event.message


async def test_what_programs_leave_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"results.json": StoredValue(digest=DIGEST, size_bytes=7)}
    event, _ = await written(Outcome({"accuracy": 0.5}, files=files).to_json(), monkeypatch)
    assert isinstance(event, ev.ModelWritten)
    assert event.result.metrics["accuracy"] == 0.5
    assert [(each.name, each.size_bytes) for each in event.result.files] == [("results.json", 7)]
