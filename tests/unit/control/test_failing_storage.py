"""Operations that storage cannot carry out: a job ends or waits, and nothing is tried for ever."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from coordinator.control import leadership, operations
from coordinator.control import store as control_store
from coordinator.control.core import effects as fx
from coordinator.control.core import events as ev
from coordinator.control.core.facts import Facts
from coordinator.control.operations import Operations
from phalanx.errors import (
    Aborted,
    DataLoss,
    Internal,
    PhalanxError,
    ResourceExhausted,
    Unavailable,
    passes_by_itself,
)
from phalanx.rpc.patience import Patience
from phalanx.v1 import coordination_service_pb2 as pb
from phalanx.v1 import storage_service_pb2 as storage_pb

TRIES_MAX = 20


def failing(cluster: Any, kind: type, code: str = "DATA_LOSS") -> list[fx.Effect]:
    """Let operations of this kind fail; return the list of those that were tried."""
    answer: Callable[[fx.Effect], ev.Event] = cluster._answer_operation
    tried: list[fx.Effect] = []

    def fail(effect: Any) -> ev.Event:
        if not isinstance(effect, kind):
            return answer(effect)
        tried.append(effect)
        assert len(tried) < TRIES_MAX, "it is tried for ever"
        return ev.OperationFailed(effect.job_id, effect.operation, code, "cannot be read")

    cluster._answer_operation = fail
    return tried


def finish(cluster: Any) -> None:
    final = storage_pb.CheckpointManifest(job_id="job-1", term=1, step=9, final=True)
    cluster.finals["job-1"] = final
    cluster.report("job-1", 9, outcome=pb.JobReport.OUTCOME_STOPPED)


def test_a_model_that_cannot_be_written_fails_the_job_and_a_retry_writes_it(running: Any) -> None:
    tried = failing(running, fx.WriteModel)
    finish(running)
    assert (running.state(), len(tried)) == ("FAILED", 1)
    assert running.job().failures[0].code == "DATA_LOSS"
    assert running.told("w1", "revoke_job")
    del running._answer_operation
    running.call(ev.RetryJob, "job-1")
    assert running.state() == "SUCCEEDED"


def test_a_job_whose_term_cannot_be_raised_ends_all_the_same(running: Any) -> None:
    tried = failing(running, fx.RaiseTerm)
    token = running.call(ev.CancelJob, "job-1")
    assert (running.state(), len(tried)) == ("CANCELLED", 1)
    assert running.answers[token].job.reason == "CANCELLED"


def test_a_new_term_that_cannot_be_raised_fails_the_job(running: Any) -> None:
    tried = failing(running, fx.RaiseTerm)
    running.kill("a1")
    running.aggregator("a1", incarnation="a1-2")
    assert running.state() == "FAILED"
    assert len(tried) == 2


def test_an_end_without_a_final_checkpoint_is_fenced_first(running: Any) -> None:
    failing(running, fx.WriteModel, operations.FINAL_CHECKPOINT_MISSING)
    running.report("job-1", 9, outcome=pb.JobReport.OUTCOME_STOPPED)
    assert running.state() == "FAILED"
    assert running.terms["job-1"] == 2


def test_a_worker_is_not_let_go_before_it_hears_what_it_is_let_go_of(running: Any) -> None:
    running.storage_up = False
    running.kill("a1")
    running.aggregator("a1", incarnation="a1-2")
    running.run_operations()
    assert running.core.facts.jobs["job-1"].term == 2
    running.say(running.sessions["w1"], drain_requested=pb.DrainRequested())
    running.advance(5)
    running.storage_up = True
    running.perform()
    kinds = [each.WhichOneof("message") for each in running.sent[running.sessions["w1"]]]
    assert "revoke_job" in kinds
    assert kinds.index("revoke_job") > len(kinds) - 1 - kinds[::-1].index("assign_job")


class FullDisk(control_store.Store):
    """A store whose calls fail because the disk is full, a few times."""

    def __init__(self, times: int) -> None:
        super().__init__("127.0.0.1:1")
        self.times = times

    async def call(self, method: Any, request: Any, **limits: Any) -> Any:
        if self.times:
            self.times -= 1
            raise ResourceExhausted("no room", reason="DISK_FULL", retry_after_s=0.001)
        if isinstance(request, storage_pb.AppendJournalRequest):
            return storage_pb.AppendJournalResponse(next_sequence=request.expected_sequence + 1)
        return storage_pb.AcquireLeaseResponse(acquired=True, lease=storage_pb.Lease(token=4))


async def test_a_full_disk_neither_ends_a_leadership_nor_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(control_store, "_PATIENCE", Patience(first_s=0.001, longest_s=0.002))
    store = FullDisk(3)
    try:
        assert (await leadership.acquire(store, "control-1", 2.0, never)).generation == 4
        store.times = 3
        assert await store.append_exactly("control", 7, [b"fact"]) == 8
    finally:
        await store.close()


async def never(_: storage_pb.Lease) -> None:
    raise AssertionError("nobody else leads")


class Store:
    """A store whose calls fail with what a test says; `insist` tries a few times."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.storage = self
        self.fence = storage_pb.Fence(lease="leader", token=1)
        self.GetJobRow = "row"
        self.RenewLease = "renew"

    async def call(
        self, method: str, request: Any, **limits: float
    ) -> storage_pb.GetJobRowResponse:
        if self.errors:
            raise self.errors.pop(0)
        return storage_pb.GetJobRowResponse(term=3)

    async def insist(self, attempt: Any) -> Any:
        for _ in range(TRIES_MAX):
            try:
                return await attempt()
            except PhalanxError as error:
                if not passes_by_itself(error):
                    raise
        raise AssertionError("it is tried for ever")


@pytest.mark.parametrize(
    ("error", "waits"),
    [
        (ResourceExhausted("no room", reason="DISK_FULL", retry_after_s=0.001), True),
        (ResourceExhausted("the message is too large"), False),
        (DataLoss("damaged"), False),
    ],
)
async def test_a_full_disk_is_waited_for(error: Exception, waits: bool) -> None:
    store: Any = Store(error, error)
    answer = await Operations(store, Facts()).perform(fx.ReadRow("job-1", 5))
    assert isinstance(answer, ev.RowRead if waits else ev.OperationFailed)


async def test_a_leader_that_cannot_renew_goes_on_until_somebody_else_leads() -> None:
    store: Any = Store(
        Unavailable("gone"),
        ResourceExhausted("no room", reason="DISK_FULL", retry_after_s=0.001),
        Internal("odd"),
        Aborted("another one leads", reason="STALE_GENERATION"),
    )
    error = await leadership.keep(store, "control-1", 7, lease_ttl_s=0.01)
    assert error.reason == "STALE_GENERATION"
    assert not store.errors
