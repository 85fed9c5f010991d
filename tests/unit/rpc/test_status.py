"""PhalanxError survives the way over the wire, whatever its size."""

from typing import Any

import grpc
import grpc.aio
import pytest

from phalanx.errors import (
    ERROR_OF_CODE,
    Cancelled,
    Code,
    InvalidArgument,
    PhalanxError,
    Unavailable,
    Violation,
)
from phalanx.rpc.status import RpcStatus, from_rpc_error, to_rpc_status, was_let_go

GUARD_S = 30.0


def _received(status: RpcStatus) -> grpc.aio.AioRpcError:
    trailer = grpc.aio.Metadata(*status.trailing_metadata)
    return grpc.aio.AioRpcError(status.code, grpc.aio.Metadata(), trailer, status.details)


def _round_trip(error: PhalanxError) -> PhalanxError:
    return from_rpc_error(_received(to_rpc_status(error)))


@pytest.mark.parametrize("code", list(Code))
def test_every_class_has_the_status_of_its_name_and_comes_back_as_itself(code: Code) -> None:
    error = ERROR_OF_CODE[code]("what happened", reason="WHY", details={"current_term": "3"})
    status = to_rpc_status(error)
    assert status.code.name == code.value
    assert status.details == "what happened"
    back = from_rpc_error(_received(status))
    assert type(back) is ERROR_OF_CODE[code]
    assert (back.message, back.reason, back.details) == (
        "what happened",
        "WHY",
        {"current_term": "3"},
    )


def test_violations_and_retry_time_come_back() -> None:
    violations = (Violation("train.batch_size", "must be positive"), Violation("name", "is empty"))
    back = _round_trip(InvalidArgument("two wrong fields", violations=violations))
    assert back.violations == violations
    assert back.retry_after_s is None
    assert _round_trip(Unavailable("later", retry_after_s=0.25)).retry_after_s == 0.25
    assert _round_trip(Unavailable("later")).retry_after_s == 1.0


def test_many_long_violations_are_cut_and_the_cut_is_said() -> None:
    violations = [Violation(f"field_{i}", "is wrong in many words " * 20) for i in range(500)]
    status = to_rpc_status(InvalidArgument("é" * 5000, violations=violations))
    assert sum(len(value) for _, value in status.trailing_metadata) < 4096
    assert len(status.details.encode()) <= 768
    back = from_rpc_error(_received(status))
    shown = len(back.violations) - 1
    assert shown >= 3
    assert [v.field for v in back.violations[:shown]] == [f"field_{i}" for i in range(shown)]
    assert back.violations[-1].message == f"and {500 - shown} more wrong fields"


def test_error_of_a_foreign_server_keeps_code_and_message() -> None:
    plain = grpc.aio.AioRpcError(
        grpc.StatusCode.PERMISSION_DENIED, grpc.aio.Metadata(), grpc.aio.Metadata(), "no"
    )
    back = from_rpc_error(plain)
    assert (back.code, back.message, back.reason) == (
        Code.PERMISSION_DENIED,
        "no",
        "PERMISSION_DENIED",
    )


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (grpc.StatusCode.UNKNOWN, Code.INTERNAL),
        (grpc.StatusCode.OUT_OF_RANGE, Code.INVALID_ARGUMENT),
    ],
)
def test_statuses_without_a_class_become_the_nearest(status: grpc.StatusCode, code: Code) -> None:
    error = grpc.aio.AioRpcError(status, grpc.aio.Metadata(), grpc.aio.Metadata(), "x")
    assert from_rpc_error(error).code is code


def test_a_call_that_ended_while_it_was_written_may_be_tried_again() -> None:
    none = grpc.aio.Metadata()
    error = grpc.aio.AioRpcError(
        grpc.StatusCode.INTERNAL, none, none, "Internal error from Core", "execute_batch"
    )
    assert isinstance(from_rpc_error(error), Unavailable)
    real = grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, none, none, "a defect")
    assert from_rpc_error(real).code is Code.INTERNAL


def test_a_call_that_a_stopping_server_let_go_may_be_tried_again() -> None:
    none = grpc.aio.Metadata()
    for details in ("CANCELLED", "", None):
        error = grpc.aio.AioRpcError(grpc.StatusCode.CANCELLED, none, none, details)
        back = from_rpc_error(error)
        assert (type(back), back.reason) == (Unavailable, "CALL_ENDED")


@pytest.mark.parametrize("details", ["Locally cancelled by application!", "Channel closed!"])
def test_a_call_that_was_cancelled_in_this_process_is_cancelled(details: str) -> None:
    none = grpc.aio.Metadata()
    error = grpc.aio.AioRpcError(grpc.StatusCode.CANCELLED, none, none, details)
    assert type(from_rpc_error(error)) is Cancelled


async def test_grpc_says_of_a_call_that_was_cancelled_here_what_it_is_known_by() -> None:
    """Channels to nobody: the texts are those of the gRPC that is installed."""
    waits: dict[str, Any] = {"timeout": GUARD_S, "wait_for_ready": True}
    async with grpc.aio.insecure_channel("127.0.0.1:1") as channel:
        call = channel.unary_unary("/test/Ask")(b"", **waits)
        call.cancel()
        assert not was_let_go((await call.code()).name, await call.details())
    with grpc.insecure_channel("127.0.0.1:1") as blocking:
        cancelled = blocking.unary_unary("/test/Ask").future(b"", **waits)
        cancelled.cancel()
        closed = blocking.unary_unary("/test/Ask").future(b"", **waits)
    for each in (cancelled, closed):
        assert not was_let_go(each.code().name, each.details())


def test_garbage_in_the_trailer_is_ignored() -> None:
    trailer = grpc.aio.Metadata(("grpc-status-details-bin", b"\xff\xff\xff"))
    error = grpc.aio.AioRpcError(
        grpc.StatusCode.ABORTED, grpc.aio.Metadata(), trailer, "stale term"
    )
    assert from_rpc_error(error).message == "stale term"
