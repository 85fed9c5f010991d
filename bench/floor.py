"""What no program of this kind gets below on a machine: a message there and back between two
processes over gRPC's asyncio streams, and a small write that is on the disk."""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from io import FileIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import grpc
import grpc.aio

from phalanx.rpc.channel import open_channel

METHOD = "/bench.Floor/Stream"
TIMES = 40
MESSAGE = b"x" * 100


class Floor(NamedTuple):
    """Medians in milliseconds, one time right after another and after a rest."""

    message_ms: float
    message_after_rest_ms: float
    disk_ms: float
    disk_after_rest_ms: float


def measure(rest_s: float) -> Floor:
    """Measure both, without and with a rest before each time."""
    with TemporaryDirectory() as folder, (Path(folder) / "file").open("wb", buffering=0) as file:
        disk = asyncio.run(_medians(_writes(file), rest_s))
    command = [sys.executable, "-P", "-m", "bench.floor"]
    root = Path(__file__).resolve().parent.parent
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as server:
        try:
            assert server.stdout is not None
            messages = asyncio.run(_messages(int(server.stdout.readline()), rest_s))
        finally:
            server.kill()
    return Floor(*messages, *disk)


async def _messages(port: int, rest_s: float) -> tuple[float, float]:
    async with open_channel(f"127.0.0.1:{port}") as channel:
        call: Any = channel.stream_stream(METHOD)(timeout=120.0)

        async def once() -> None:
            await call.write(MESSAGE)
            await call.read()

        await once()
        return await _medians(once, rest_s)


def _writes(file: FileIO) -> Callable[[], Awaitable[None]]:
    async def once() -> None:
        file.write(bytes(4096))
        os.fdatasync(file.fileno())

    return once


async def _medians(once: Callable[[], Awaitable[None]], rest_s: float) -> tuple[float, float]:
    found = []
    for pause_s in (0.0, rest_s):
        taken = []
        for _ in range(TIMES):
            await asyncio.sleep(pause_s)
            began_s = time.perf_counter()
            await once()
            taken.append((time.perf_counter() - began_s) * 1000)
        found.append(statistics.median(taken))
    return found[0], found[1]


async def _serve() -> None:
    async def stream(_: Any, context: Any) -> None:
        while (message := await context.read()) is not grpc.aio.EOF:
            await context.write(message)

    server = grpc.aio.server()
    handlers: dict[str, Any] = {"Stream": grpc.stream_stream_rpc_method_handler(stream)}
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("bench.Floor", handlers),)
    )
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(_serve())
