"""Runs a service as one of another version of the protocol.

    python -P -m phalanx.testing.next_version 1-2 coordinator control --listen ... --storage ...

It is the code of this version, with other numbers and with what a later one would say in addition:
a field that nobody knows in every message and in every message within, and on each session a
message of a kind that nobody knows. An enum value or a member of a oneof that was added later
looks no different on the wire.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import Message

from phalanx.rpc import protocol

UNKNOWN = b"\xfa\xff\x03\x05later"
"""Field 8191 of wire type 2; no message has one."""

Serializer = Callable[[Any], bytes]


def with_unknown(message: Message) -> bytes:
    """Return a message as the later version would write it."""
    copy = type(message)()
    copy.CopyFrom(message)
    _extend(copy)
    return copy.SerializeToString()


def _extend(message: Message) -> None:
    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        for each in value if field.is_repeated else [value]:
            if not field.message_type.full_name.startswith("google."):
                _extend(each)
    message.MergeFromString(UNKNOWN)


def _later(serializer: Serializer | None) -> Serializer | None:
    if serializer is None:
        return None

    def serialize(message: Any) -> bytes:
        if isinstance(message, Message) and message.DESCRIPTOR.full_name.startswith("phalanx."):
            return with_unknown(message)
        return serializer(message)

    return serialize


def speak(oldest: int, newest: int) -> None:
    """Make this process one that speaks these versions."""
    protocol.OLDEST, protocol.NEWEST = oldest, newest
    channel = import_module("grpc.aio._channel").Channel
    for kind in ("unary_unary", "unary_stream", "stream_unary", "stream_stream"):
        _extend_calls(channel, kind)
        _extend_handlers(f"{kind}_rpc_method_handler")
    _extend_frames()
    _extend_sessions()


def _extend_frames() -> None:
    """Frames of tensors are written by hand, around a header."""
    from phalanx import frames

    usual = frames._encode  # noqa: SLF001 - as above

    def encode(header: bytes, payload: Any) -> bytes:
        return usual(header + UNKNOWN, payload)

    frames._encode = encode  # noqa: SLF001


def _extend_calls(channel: Any, kind: str) -> None:
    usual = getattr(channel, kind)

    def opened(self: Any, method: str, request_serializer: Any = None, *rest: Any, **more: Any):  # type: ignore[no-untyped-def]
        return usual(self, method, _later(request_serializer), *rest, **more)

    setattr(channel, kind, opened)


def _extend_handlers(name: str) -> None:
    usual = getattr(grpc, name)

    def made(behaviour: Any, request_deserializer: Any = None, response_serializer: Any = None):  # type: ignore[no-untyped-def]
        return usual(behaviour, request_deserializer, _later(response_serializer))

    setattr(grpc, name, made)


def _extend_sessions() -> None:
    """What a member of a later version reports, and its control asks, that nobody knows."""
    from phalanx.rpc.member_session import MemberSession
    from phalanx.v1.coordination_service_pb2 import SessionRequest

    usual = MemberSession.start

    def start(self: MemberSession) -> None:
        usual(self)
        self.report(SessionRequest.FromString(UNKNOWN))

    MemberSession.start = start  # type: ignore[method-assign]


def main() -> None:
    """Take the versions off the command line, and run the service that it names."""
    oldest, _, newest = sys.argv[1].partition("-")
    speak(int(oldest), int(newest))
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
