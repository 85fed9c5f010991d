"""Makes the calls of grpcurl that are in the documents, where grpcurl is not installed.

    python -P -m tests.system.grpcurl -plaintext -d @ localhost:7410 phalanx.v1.JobService/SubmitJob

As grpcurl it knows nothing beforehand: what methods and messages there are the server tells by
reflection, and JSON becomes a message by these descriptors alone. A flag or a kind of call that no
document needs is refused, never passed over.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import grpc
from google.protobuf import descriptor_pool, json_format, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

TIMEOUT_S = 60.0
EXIT_USAGE = 2
#: A call that fails gives this and the number of its status.
EXIT_STATUS = 64

Metadata = tuple[tuple[str, str], ...]


class UsageError(Exception):
    """The command line is not one that is known here, or grpcurl would not take it."""


@dataclass
class Call:
    """What a command line asks for."""

    address: str = ""
    method: str = ""
    plaintext: bool = False
    expand_headers: bool = False
    data: str = ""
    ca: str = ""
    headers: list[str] = field(default_factory=list)


def parse(words: Sequence[str]) -> Call:
    """Read a command line as Go does: flags come first, with one dash or two, values behind `=` or
    as the next word."""
    call, rest = Call(), list(words)
    while rest and rest[0].startswith("-"):
        name, equals, value = rest.pop(0).lstrip("-").partition("=")
        match name:
            case "plaintext" | "expand-headers" if not equals:
                setattr(call, name.replace("-", "_"), True)
            case "d" | "H" | "cacert":
                if not equals and not rest:
                    raise UsageError(f"-{name} needs a value")
                value = value if equals else rest.pop(0)
                if name == "H":
                    call.headers.append(value)
                else:
                    setattr(call, {"d": "data", "cacert": "ca"}[name], value)
            case _:
                raise UsageError(f"-{name} is in no document: say here what it means")
    if len(rest) != 2:
        raise UsageError(f"an address and a method are expected, not {rest}")
    call.address, call.method = rest
    if "/" not in call.method:
        raise UsageError(f"{call.method!r} is in no document: SERVICE/METHOD is expected")
    if call.plaintext and call.ca:
        raise UsageError("-cacert is of no use with -plaintext")
    return call


def metadata_of(call: Call, environ: Mapping[str, str]) -> Metadata:
    """Return the headers; with -expand-headers `${NAME}` stands for a variable that there is."""

    def value_of(name: re.Match[str]) -> str:
        if name[1] not in environ:
            raise UsageError(f"{name[0]}: there is no such variable")
        return environ[name[1]]

    pairs = []
    for header in call.headers:
        name, _, value = header.partition(":")
        if call.expand_headers:
            value = re.sub(r"\$\{([^}]*)\}", value_of, value)
        pairs.append((name.strip().lower(), value.strip()))
    return tuple(pairs)


class _Details(NamedTuple):
    method: str
    timeout: float | None
    metadata: Any
    credentials: Any
    wait_for_ready: bool | None
    compression: Any


class _Headers(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Gives every call the headers, those of reflection as well."""

    def __init__(self, metadata: Metadata) -> None:
        self._metadata = metadata

    def _continue(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        known = (details.credentials, details.wait_for_ready, details.compression)
        # Servers that never answer must not hang whoever asks what methods they have.
        told = _Details(details.method, TIMEOUT_S, self._metadata, *known)
        return continuation(told, request)

    intercept_unary_unary = _continue
    intercept_unary_stream = _continue
    intercept_stream_stream = _continue


def open_channel(call: Call, metadata: Metadata) -> grpc.Channel:
    """Open a channel, by TLS unless it is to be plaintext."""
    options = [("grpc.enable_http_proxy", 0)]
    if call.plaintext:
        channel = grpc.insecure_channel(call.address, options)
    else:
        trusted = Path(call.ca).read_bytes() if call.ca else None
        channel = grpc.secure_channel(call.address, grpc.ssl_channel_credentials(trusted), options)
    return grpc.intercept_channel(channel, _Headers(metadata))


def answers(call: Call, channel: grpc.Channel, data: str) -> Iterator[str]:
    """Make the call; the responses as JSON."""
    pool = descriptor_pool.DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
    service, _, name = call.method.partition("/")
    try:
        method = pool.FindServiceByName(service).methods_by_name[name]
    except KeyError:
        raise UsageError(f"the server has no {call.method}") from None
    if method.client_streaming:
        raise UsageError(f"{call.method} takes a stream, which no document sends")
    request = message_factory.GetMessageClass(method.input_type)()
    try:
        json_format.Parse(data or "{}", request, descriptor_pool=pool)
    except json_format.ParseError as error:
        raise UsageError(f"that is no {method.input_type.full_name}: {error}") from None
    response = message_factory.GetMessageClass(method.output_type)
    make = channel.unary_stream if method.server_streaming else channel.unary_unary
    made: Any = make(f"/{call.method}", type(request).SerializeToString, response.FromString)
    answer = made(request)
    for message in answer if method.server_streaming else [answer]:
        yield json_format.MessageToJson(message, descriptor_pool=pool)


def main(words: Sequence[str]) -> int:
    """Do what grpcurl would; returns the exit code."""
    try:
        call = parse(words)
        data = sys.stdin.read() if call.data == "@" else call.data
        with open_channel(call, metadata_of(call, os.environ)) as channel:
            for answer in answers(call, channel, data):
                print(answer, flush=True)
    except UsageError as error:
        print(error, file=sys.stderr)
        return EXIT_USAGE
    except grpc.RpcError as error:
        status: Any = error
        print(
            f"ERROR:\n  Code: {status.code().name}\n  Message: {status.details()}", file=sys.stderr
        )
        return EXIT_STATUS + int(status.code().value[0])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
