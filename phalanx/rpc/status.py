"""PhalanxError to google.rpc.Status and back.

On the wire an error is the plain gRPC status plus, in the trailer ``grpc-status-details-bin``,
ErrorInfo (reason and details, domain ``phalanx``), BadRequest (the violations without their lines,
which only the reader of a file knows) and RetryInfo. gRPC drops calls whose metadata exceeds 8 KiB,
so long lists of violations are cut and the cut is said.
"""

from typing import Any, NamedTuple

import grpc
import grpc.aio
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from phalanx.errors import (
    ERROR_OF_CODE,
    Cancelled,
    Code,
    Internal,
    InvalidArgument,
    PhalanxError,
    Unavailable,
    Violation,
)
from phalanx.texts import number_of

DOMAIN = "phalanx"
_TRAILER = "grpc-status-details-bin"
# The trailer is sent in base64 and the message once more in percent encoding, all within 8 KiB.
_DETAILS_LIMIT_BYTES = 3840
_MESSAGE_LIMIT_BYTES = 768
_MORE_BYTES = 64
# What grpc.aio makes of a message that it cannot write since the other side has ended the call: the
# real status is lost, and the next try gets it.
_WRITE_FAILED = "Internal error from Core"
# What gRPC says of calls that were cancelled in this process. All others the other side let go: as
# a server stops, gRPC says CANCELLED, and nothing else, to calls that have arrived there and that
# the server has not been given yet.
_CANCELLED_HERE = ("Locally cancelled by application!", "Channel closed!")
CALL_ENDED = "CALL_ENDED"
"""The reason of `Unavailable` where a call ended without an answer and nobody here wished it."""


class RpcStatus(NamedTuple):
    """What ``context.abort`` takes, in its order."""

    code: grpc.StatusCode
    details: str
    trailing_metadata: tuple[tuple[str, bytes], ...]


def to_rpc_status(error: PhalanxError) -> RpcStatus:
    """Return the rich status of ``error``; use it as ``context.abort(*to_rpc_status(error))``."""
    message = _cut(error.message, _MESSAGE_LIMIT_BYTES)
    status = status_pb2.Status(code=code_pb2.Code.Value(error.code.value), message=message)
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)
    for key, value in error.details.items():
        info.metadata[key] = _cut(value, 256)
    _add(status, info)
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        _add(status, error_details_pb2.RetryInfo(retry_delay=delay))
    if error.violations:
        room = _DETAILS_LIMIT_BYTES - status.ByteSize()
        _add(status, _bad_request(error.violations, room))
    trailer = ((_TRAILER, status.SerializeToString()),)
    return RpcStatus(grpc.StatusCode[error.code.value], message, trailer)


def from_rpc_error(error: grpc.RpcError) -> PhalanxError:
    """Return the PhalanxError that the server raised, or the one nearest to gRPC's own error."""
    code = _code_of(error)
    message = str(_call(error, "details") or code.value)
    status = _rich_status(error)
    if status is not None:
        return _from_status(code, status, message)
    if code is Internal.code and message == _WRITE_FAILED:
        return Unavailable(
            "the call ended while it was being written; try again", reason=CALL_ENDED
        )
    if was_let_go(code.value, message):
        return Unavailable(
            "the call was let go by the other side, which is stopping; try again",
            reason=CALL_ENDED,
            retry_after_s=None,
        )
    return ERROR_OF_CODE[code](message)


def was_let_go(code: str, details: str | None) -> bool:
    """Whether a call that has no rich status was cancelled, and not in this process."""
    return code == Cancelled.code.value and details not in _CANCELLED_HERE


def _code_of(error: grpc.RpcError) -> Code:
    code = _call(error, "code")
    name = code.name if isinstance(code, grpc.StatusCode) else "UNKNOWN"
    if name in Code.__members__:
        return Code(name)
    return InvalidArgument.code if name == "OUT_OF_RANGE" else Internal.code


def _from_status(code: Code, status: status_pb2.Status, message: str) -> PhalanxError:
    reason = ""
    details: dict[str, str] = {}
    violations: list[Violation] = []
    retry_after_s: float | None = None
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        request = error_details_pb2.BadRequest()
        retry = error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            reason, details = info.reason, dict(info.metadata)
        elif detail.Unpack(request):
            violations = [Violation(i.field, i.description) for i in request.field_violations]
        elif detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
    return ERROR_OF_CODE[code](
        status.message or message,
        reason=reason,
        violations=violations,
        retry_after_s=retry_after_s,
        details=details,
    )


def _bad_request(
    violations: tuple[Violation, ...], room_bytes: int
) -> error_details_pb2.BadRequest:
    request = error_details_pb2.BadRequest()
    for index, violation in enumerate(violations):
        item = error_details_pb2.BadRequest.FieldViolation(
            field=_cut(violation.field, 256), description=_cut(violation.message, 512)
        )
        if request.ByteSize() + item.ByteSize() + _MORE_BYTES > room_bytes:
            left = len(violations) - index
            request.field_violations.add(description=f"and {number_of(left, 'more wrong field')}")
            break
        request.field_violations.append(item)
    return request


def _rich_status(error: grpc.RpcError) -> status_pb2.Status | None:
    trailer: Any = _call(error, "trailing_metadata")
    for key, value in trailer or ():
        if key == _TRAILER and isinstance(value, bytes):
            status = status_pb2.Status()
            try:
                status.ParseFromString(value)
            except DecodeError:
                return None
            return status
    return None


def _call(error: grpc.RpcError, name: str) -> object:
    # grpc.RpcError declares none of these; the errors that calls raise have them all.
    method = getattr(error, name, None)
    return method() if callable(method) else None


def _add(status: status_pb2.Status, detail: Message) -> None:
    packed = any_pb2.Any()
    packed.Pack(detail)
    status.details.append(packed)


def _cut(text: str, limit_bytes: int) -> str:
    data = text.encode()
    if len(data) <= limit_bytes:
        return text
    return data[: limit_bytes - 3].decode(errors="ignore") + "…"


async def error_of(call: Any) -> grpc.aio.AioRpcError | None:
    """Return what a stream that is over ended with; None: its server ended it in good order."""
    code = await call.code()
    if code is grpc.StatusCode.OK:
        return None
    return grpc.aio.AioRpcError(
        code,
        await call.initial_metadata(),
        await call.trailing_metadata(),
        details=await call.details(),
    )
