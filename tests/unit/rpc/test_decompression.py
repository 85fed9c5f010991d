"""A compressed message is refused before it is inflated; memory shows it, not the status."""

import asyncio
import os
import sys
from collections.abc import Sequence

import grpc
import grpc.aio
import psutil
import pytest
from grpc_health.v1 import health_pb2

from phalanx.rpc.channel import open_channel

MIB = 1024 * 1024
BOMB_BYTES = 96 * MIB
GUARD_S = 60.0

# A server of its own, so that its memory can be told from that of the client.
PROGRAM = """
import asyncio, sys
from phalanx.rpc.server import Server

async def main():
    options = [("grpc.compression_enabled_algorithms_bitset", 7),
               ("grpc.max_receive_message_length", -1)] if sys.argv[1] == "open" else []
    server = Server(listen="127.0.0.1:0", metrics_listen=None, service_names=[], options=options)
    await server.start()
    print(server.address, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(0)

asyncio.run(main())
"""


async def _growth_bytes(kind: str) -> tuple[int, grpc.StatusCode]:
    """Send one bomb to a new server; return how much its memory grew at most, and the status."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",
        "-c",
        PROGRAM,
        kind,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert process.stdout is not None
    assert process.stdin is not None
    async with asyncio.timeout(GUARD_S):
        address = (await process.stdout.readline()).decode().strip()
        before = psutil.Process(process.pid).memory_info().rss
        message = health_pb2.HealthCheckRequest(service="0" * BOMB_BYTES).SerializeToString()
        async with grpc.aio.insecure_channel(
            address, options=[("grpc.max_send_message_length", -1)]
        ) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary("/grpc.health.v1.Health/Check")(
                    message, timeout=GUARD_S, compression=grpc.Compression.Gzip
                )
        peak = _peak_bytes(process.pid)
        process.stdin.close()
        await process.wait()
    return peak - before, caught.value.code()


def _peak_bytes(pid: int) -> int:
    with open(f"/proc/{pid}/status", encoding="ascii") as status:
        lines = dict(line.split(":", 1) for line in status)
    return int(lines["VmHWM"].split()[0]) * 1024


async def test_gzip_bomb_is_refused_without_being_inflated() -> None:
    growth, status = await _growth_bytes("closed")
    assert status is grpc.StatusCode.UNIMPLEMENTED
    assert growth <= 16 * MIB


async def test_the_bomb_is_real_where_the_limits_are_off() -> None:
    growth, _ = await _growth_bytes("open")
    assert growth >= BOMB_BYTES


HOSTILE_SERVER = """
import asyncio, sys
import grpc, grpc.aio

async def main():
    server = grpc.aio.server(options=[("grpc.max_send_message_length", -1)],
                             compression=grpc.Compression.Gzip)
    async def answer(request, context):
        return bytes(int(sys.argv[1]))
    handlers = {"Unfold": grpc.unary_unary_rpc_method_handler(answer)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Bomb", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"127.0.0.1:{port}", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(0)

asyncio.run(main())
"""


async def _growth_of_client_bytes(options: Sequence[tuple[str, int]]) -> tuple[int, bool]:
    """Be answered by a bomb; return how much this process grew at most, and whether it was read."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",
        "-c",
        HOSTILE_SERVER,
        str(BOMB_BYTES),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    async with asyncio.timeout(GUARD_S):
        address = (await process.stdout.readline()).decode().strip()
        before = psutil.Process().memory_info().rss
        with open("/proc/self/clear_refs", "w", encoding="ascii") as peak:
            peak.write("5")
        is_read = True
        async with open_channel(address, extra=options) as channel:
            try:
                await channel.unary_unary("/test.Bomb/Unfold")(b"", timeout=GUARD_S)
            except grpc.aio.AioRpcError:
                is_read = False
        growth = _peak_bytes(os.getpid()) - before
        process.stdin.close()
        await process.wait()
    return growth, is_read


async def test_clients_refuse_answers_that_would_unfold() -> None:
    growth, is_read = await _growth_of_client_bytes([])
    assert not is_read
    assert growth <= 16 * MIB


async def test_the_answer_is_a_bomb_where_the_limits_are_off() -> None:
    growth, is_read = await _growth_of_client_bytes(
        [
            ("grpc.max_receive_message_length", -1),
            ("grpc.compression_enabled_algorithms_bitset", 7),
        ]
    )
    assert is_read
    assert growth >= BOMB_BYTES
