"""Hostile peers of a server: a process that does one thing that no honest client does.

    with Attack("mute_connections", storage.address) as attack:
        ...                     # it stands here, and is kept up for as long as the block lasts
    print(attack.report)

Each attack is a process of its own, so that its cost is not counted as that of whoever measures.
`python -m phalanx.testing.attackers KIND ADDRESS` runs one by hand until its standard input ends.
They need nothing but the address: point them only at servers of your own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio

MIB = 1024 * 1024
GUARD_S = 120.0
"""Longest wait for an attack to stand; a guard against a hang, not a measure."""

MUTE_CONNECTIONS = 1500
HELD_STREAMS = 1000
BOMB_BYTES = 512 * MIB
_STREAMS_PER_CONNECTION = 125
_UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
_HEALTH = "/grpc.health.v1.Health/"
_METHODS = (
    "/phalanx.v1.CoordinationService/Session",
    "/phalanx.v1.JobService/SubmitJob",
    "/phalanx.v1.StorageService/PutBlob",
    "/phalanx.v1.StorageService/GetBlob",
    "/phalanx.v1.AggregationService/Exchange",
    _HEALTH + "Check",
)
"""One of each shape; a server answers those that it has not with UNIMPLEMENTED."""
_EVERYWHERE = (_HEALTH + "Check", "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
"""One message and a stream of messages, on every server."""


class Attack:
    """One attack on one address, from a process of its own. `report` is what it says at its end."""

    def __init__(self, kind: str, address: str) -> None:
        self.report: dict[str, int] = {}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "phalanx.testing.attackers", kind, address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            text=True,
        )

    def __enter__(self) -> Self:
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "stands\n":
            self._process.kill()
            raise RuntimeError(f"the attack ended with {self._process.wait()} before it stood")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            output, _ = self._process.communicate("", timeout=GUARD_S)
            self.report = json.loads(output or "{}")
        finally:
            self._process.kill()
            self._process.wait()


async def _mute_connections(address: str, standing: asyncio.Event, seen: Counter[str]) -> None:
    """Connections that never say a word; each is opened again when it was closed."""
    host, _, port = address.rpartition(":")
    open_now = 0

    async def keep_one() -> None:
        nonlocal open_now
        while True:
            try:
                reader, writer = await asyncio.open_connection(host, int(port))
            except OSError:
                seen["refused"] += 1
                await asyncio.sleep(0.1)
                continue
            open_now += 1
            seen["most_open"] = max(seen["most_open"], open_now)
            if open_now >= MUTE_CONNECTIONS:
                standing.set()
            with contextlib.suppress(OSError):
                await reader.read()
            seen["closed"] += 1
            open_now -= 1
            writer.close()

    async with asyncio.TaskGroup() as tasks:
        for index in range(MUTE_CONNECTIONS):
            tasks.create_task(keep_one())
            if index % 50 == 49:
                await asyncio.sleep(0.01)


async def _held_streams(address: str, standing: asyncio.Event, seen: Counter[str]) -> None:
    """Calls of every shape of which only the headers are sent; opened again when ended."""
    await _held(address, standing, seen, lambda index: (_METHODS[index % len(_METHODS)], None))


async def _watching_streams(address: str, standing: asyncio.Event, seen: Counter[str]) -> None:
    """Streams that anybody may open, and that last for as long as their caller likes."""
    await _held(address, standing, seen, lambda _: (_HEALTH + "Watch", b""))


async def _held(
    address: str,
    standing: asyncio.Event,
    seen: Counter[str],
    choose: Callable[[int], tuple[str, bytes | None]],
) -> None:
    open_now = 0

    async def keep_one(channel: grpc.aio.Channel, index: int) -> None:
        nonlocal open_now
        while True:
            method, message = choose(index)
            call: Any = channel.stream_stream(method)(timeout=3600.0)
            open_now += 1
            if open_now >= HELD_STREAMS:
                standing.set()
            try:
                if message is not None:
                    await call.write(message)
                while await call.read() is not grpc.aio.EOF:
                    seen["messages"] += 1
                seen["ended"] += 1
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                code = (await call.code()).name
                seen[code] += 1
                if code == "UNIMPLEMENTED":
                    index += 1  # not a method of this server: hold another
            open_now -= 1
            await asyncio.sleep(0.1)

    async with asyncio.TaskGroup() as tasks:
        for first in range(0, HELD_STREAMS, _STREAMS_PER_CONNECTION):
            channel = grpc.aio.insecure_channel(address, options=_UNLIMITED)
            for index in range(first, first + _STREAMS_PER_CONNECTION):
                tasks.create_task(keep_one(channel, index))


async def _bombs(address: str, standing: asyncio.Event, seen: Counter[str]) -> None:
    """Messages of half a mebibyte that unfold into 512."""
    bomb = bytes(BOMB_BYTES)
    async with grpc.aio.insecure_channel(address, options=_UNLIMITED) as channel:
        for method in _EVERYWHERE:
            await _send(channel, method, bomb, seen, compression=grpc.Compression.Gzip)
            standing.set()
    await asyncio.Event().wait()


async def _oversized_messages(address: str, standing: asyncio.Event, seen: Counter[str]) -> None:
    """Messages just above and far above the limit, one after another."""
    await _repeat(address, standing, seen, [bytes(4 * MIB + 1), bytes(64 * MIB)])


async def _deep_messages(address: str, standing: asyncio.Event, seen: Counter[str]) -> None:
    """Messages nested deeper than any parser's stack: groups, and messages within messages."""
    nested = b""
    for _ in range(2000):
        nested = b"\x0a" + _varint(len(nested)) + nested
    await _repeat(address, standing, seen, [b"\x0b" * 100_000, nested])


async def _repeat(
    address: str, standing: asyncio.Event, seen: Counter[str], messages: list[bytes]
) -> None:
    async with grpc.aio.insecure_channel(address, options=_UNLIMITED) as channel:
        while True:
            for method in _METHODS:
                for message in messages:
                    await _send(channel, method, message, seen)
            standing.set()
            await asyncio.sleep(0.05)


async def _send(
    channel: grpc.aio.Channel, method: str, message: bytes, seen: Counter[str], **options: Any
) -> None:
    call: Any = channel.stream_stream(method)(timeout=GUARD_S, **options)
    try:
        await call.write(message)
        await call.done_writing()
        while await call.read() is not grpc.aio.EOF:
            seen["messages"] += 1
        seen["OK"] += 1
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
        seen[(await call.code()).name] += 1


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value))


Run = Callable[[str, asyncio.Event, Counter[str]], Awaitable[None]]
ATTACKS: dict[str, Run] = {
    "mute_connections": _mute_connections,
    "held_streams": _held_streams,
    "watching_streams": _watching_streams,
    "bombs": _bombs,
    "oversized_messages": _oversized_messages,
    "deep_messages": _deep_messages,
}


async def _run(kind: str, address: str) -> None:
    standing, seen = asyncio.Event(), Counter[str]()
    attack = asyncio.ensure_future(ATTACKS[kind](address, standing, seen))
    stands = asyncio.create_task(standing.wait())
    await asyncio.wait((attack, stands), return_when=asyncio.FIRST_COMPLETED)
    if attack.done():
        attack.result()
    print("stands", flush=True)
    told = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
    await asyncio.wait((attack, told), return_when=asyncio.FIRST_COMPLETED)
    if attack.done():
        attack.result()
    print(json.dumps(seen), flush=True)
    # Of a thousand calls that are cancelled at once not all end; the kernel closes them as well.
    os._exit(0)


def main() -> int:
    """Run one attack until standard input ends."""
    kind, address = sys.argv[1:]
    asyncio.run(_run(kind, address))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
