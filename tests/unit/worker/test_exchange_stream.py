"""A stream to an aggregator: however it breaks, another one is opened."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from phalanx.errors import Unavailable
from phalanx.v1 import aggregation_service_pb2 as pb
from worker.session import exchange, streams
from worker.session.exchange import ExchangeStream
from worker.session.streams import run_once

GUARD_S = 30.0


class Events:
    """Has something to send at once."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def opened(self, _: str) -> None:
        self.seen.append("opened")

    def closed(self, _: str) -> None:
        self.seen.append("closed")

    def next_message(self, _: str) -> bytes:
        return b"frame"


@pytest.fixture
async def stream(monkeypatch: pytest.MonkeyPatch) -> Any:
    async def rest(*_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(exchange, "keep_open", rest)
    made = ExchangeStream("a1", "127.0.0.1:1", pb.ExchangeHello(job_id="job-1"), Events())
    yield made
    await made.close()


async def test_a_call_that_is_cancelled_while_it_breaks_is_one_stream_that_ended(
    stream: ExchangeStream,
) -> None:
    failed = asyncio.Event()

    class Call:
        async def write(self, _: bytes) -> None:
            failed.set()
            raise asyncio.InvalidStateError

        async def read(self) -> bytes:
            await failed.wait()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            raise asyncio.CancelledError

    async with asyncio.timeout(GUARD_S):
        with pytest.raises(Unavailable, match="cancelled"):
            await stream.talk(Call())


async def test_an_aggregator_that_does_not_even_take_the_hello_is_given_up(
    stream: ExchangeStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "WELCOME_TIMEOUT_S", 0.01)

    class Call:
        async def write(self, _: bytes) -> None:
            await asyncio.Event().wait()

        def cancel(self) -> None:
            """Nothing to end."""

    class Channel:
        def stream_stream(self, _: str) -> Any:
            return lambda timeout: Call()

    channel: Any = Channel()
    async with asyncio.timeout(GUARD_S):
        opened, error = await run_once(stream, channel)
    assert (opened, error.reason) == (False, "NO_WELCOME")
