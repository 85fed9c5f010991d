"""The baseline of the exchange: a bare gRPC echo of the same bytes in the same frames.

Nothing is parsed, added or copied by Python: the server sends back each message
that it gets. Clients are processes of their own, as workers are.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import multiprocessing.connection
import os
import statistics
import time
from collections.abc import AsyncIterator, Iterator
from concurrent import futures
from typing import Any

import grpc
import grpc.aio

METHOD = "/bench.Echo/Exchange"
OPTIONS = [
    ("grpc.max_send_message_length", 4 * 1024 * 1024),
    ("grpc.max_receive_message_length", 4 * 1024 * 1024),
    ("grpc.enable_http_proxy", 0),
]


class _Handlers(grpc.GenericRpcHandler):
    def __init__(self, behaviour: Any) -> None:
        self._handler: Any = grpc.stream_stream_rpc_method_handler(behaviour)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        return self._handler if handler_call_details.method == METHOD else None


def _serve_threads(pipe: multiprocessing.connection.Connection) -> None:
    def echo(requests: Iterator[bytes], _: Any) -> Iterator[bytes]:
        yield from requests

    server = grpc.server(futures.ThreadPoolExecutor(8), options=OPTIONS)
    server.add_generic_rpc_handlers((_Handlers(echo),))
    pipe.send(server.add_insecure_port("127.0.0.1:0"))
    server.start()
    pipe.recv()
    server.stop(0)


def _serve_asyncio(pipe: multiprocessing.connection.Connection) -> None:
    async def echo(_: AsyncIterator[bytes], context: Any) -> None:
        while (message := await context.read()) is not grpc.aio.EOF:
            await context.write(message)

    async def serve() -> None:
        server = grpc.aio.server(options=OPTIONS)
        server.add_generic_rpc_handlers((_Handlers(echo),))
        pipe.send(server.add_insecure_port("127.0.0.1:0"))
        await server.start()
        await asyncio.to_thread(pipe.recv)
        await server.stop(0)

    asyncio.run(serve())


def _client(port: int, frame_bytes: list[int], pipe: multiprocessing.connection.Connection) -> None:
    """Sends the frames and reads their echoes, once per request on the pipe."""
    frames = {size: os.urandom(size) for size in set(frame_bytes)}
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=OPTIONS) as channel:
        method: Any = channel.stream_stream(METHOD)
        while pipe.recv():
            start = time.perf_counter()
            received = sum(
                len(message)
                for message in method((frames[size] for size in frame_bytes), timeout=60)
            )
            assert received == sum(frame_bytes)
            pipe.send(time.perf_counter() - start)


class EchoBaseline:
    """An echo server and its clients, ready to be measured repeatedly.

    Args:
        kind: ``threads`` (grpcio's synchronous server) or ``asyncio``.
        clients: number of client processes.
        frame_bytes: the sizes of the frames that each client sends per round.
    """

    def __init__(self, kind: str, clients: int, frame_bytes: list[int]) -> None:
        context = multiprocessing.get_context("spawn")
        self._processes: list[Any] = []
        self._frame_bytes = frame_bytes
        serve = {"threads": _serve_threads, "asyncio": _serve_asyncio}[kind]
        self._server, server_end = context.Pipe()
        self._start(context.Process(target=serve, args=(server_end,), daemon=True))
        port = self._server.recv()
        self._clients = []
        for _ in range(clients):
            ours, theirs = context.Pipe()
            self._start(
                context.Process(target=_client, args=(port, frame_bytes, theirs), daemon=True)
            )
            self._clients.append(ours)

    def _start(self, process: Any) -> None:
        process.start()
        self._processes.append(process)

    def measure_bytes_per_s(self) -> float:
        """One round of all clients at once; bytes up and down per second."""
        start = time.perf_counter()
        for pipe in self._clients:
            pipe.send(True)
        for pipe in self._clients:
            pipe.recv()
        moved = 2 * len(self._clients) * sum(self._frame_bytes)
        return moved / (time.perf_counter() - start)

    def close(self) -> None:
        """Ends the clients, then the server."""
        for pipe in self._clients:
            pipe.send(False)
        self._server.send(None)
        for process in self._processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()


def main() -> None:
    """Prints the median of both kinds for 2 clients and 100 MB each."""
    for kind in ("threads", "asyncio"):
        for frame in (256 * 1024, 1024 * 1024, 15 * 65536 * 4):
            count = 100_000_000 // frame
            echo = EchoBaseline(kind, 2, [frame] * count)
            rates = [echo.measure_bytes_per_s() for _ in range(8)]
            echo.close()
            print(f"{kind:8} {frame:8} {statistics.median(rates[2:]) / 1e9:.2f} GB/s")


if __name__ == "__main__":
    main()
