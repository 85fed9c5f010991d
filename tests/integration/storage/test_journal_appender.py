"""Appends over one stream: each durable when it is answered, and none done twice."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio
import pytest

from phalanx.clients.journal_appender import JournalAppender
from phalanx.errors import Aborted, DeadlineExceeded, Unavailable

GUARD_S = 30.0


async def payloads(client: Any, stream: str) -> list[bytes]:
    return [record.payload async for record in client.read_journal(stream)]


async def test_one_append_after_another(client: Any) -> None:
    appender = client.journal_appender()
    assert await appender.append("tasks/a", [b"a", b"b"], 0) == 2
    assert await appender.append("tasks/a", [b"c"], 2) == 3
    assert await appender.append("tasks/b", [b"d"], 0) == 1
    assert await payloads(client, "tasks/a") == [b"a", b"b", b"c"]
    appender.close()


async def test_a_place_that_is_taken_is_refused_and_another_append_goes_through(
    client: Any,
) -> None:
    appender = client.journal_appender()
    await client.append_journal("tasks/a", [b"first"])
    with pytest.raises(Aborted) as caught:
        await appender.append("tasks/a", [b"mine"], 0)
    assert caught.value.reason == "SEQUENCE_MISMATCH"
    assert caught.value.details == {"next_sequence": "1"}
    assert await appender.append("tasks/a", [b"mine"], 1) == 2
    assert await payloads(client, "tasks/a") == [b"first", b"mine"]
    appender.close()


async def test_a_stream_that_was_cut_is_said_and_opened_anew(client: Any) -> None:
    appender = client.journal_appender()
    await appender.append("tasks/a", [b"a"], 0)
    appender._call.cancel()
    with pytest.raises(Unavailable):
        await appender.append("tasks/a", [b"b"], 1)
    assert await appender.append("tasks/a", [b"b"], 1) == 2
    assert await payloads(client, "tasks/a") == [b"a", b"b"]
    appender.close()


async def test_a_storage_that_stops_does_not_wait_for_streams(service: Any, client: Any) -> None:
    appender = client.journal_appender()
    await appender.append("tasks/a", [b"a"], 0)
    async with asyncio.timeout(GUARD_S):
        await service.stop(10 * GUARD_S)
    with pytest.raises(Unavailable):
        await appender.append("tasks/a", [b"b"], 1)
    appender.close()


async def test_a_storage_that_is_gone_is_said_and_found_again(service: Any, client: Any) -> None:
    appender = client.journal_appender()
    await appender.append("tasks/a", [b"a"], 0)
    await service.server.stop(0.0)
    with pytest.raises(Unavailable):
        await appender.append("tasks/a", [b"b"], 1)
    appender.close()


class Silent:
    """A stream that takes everything and answers nothing."""

    cancelled = False

    async def write(self, _: Any) -> None:
        pass

    async def read(self) -> Any:
        await asyncio.Event().wait()

    def cancel(self) -> None:
        self.cancelled = True


async def test_a_silent_storage_is_not_waited_for_and_its_stream_is_ended() -> None:
    stream = Silent()
    appender = JournalAppender(lambda **_: stream, timeout_s=0.01)
    with pytest.raises(DeadlineExceeded, match="did not answer an append to 'tasks/a'"):
        await appender.append("tasks/a", [b"a"], 0)
    assert stream.cancelled


async def test_an_append_that_was_given_up_leaves_no_answer_to_the_next() -> None:
    streams: list[Silent] = []

    def opened(**_: Any) -> Silent:
        streams.append(Silent())
        return streams[-1]

    appender = JournalAppender(opened, timeout_s=60.0)
    for count in (1, 2):
        waiting = asyncio.create_task(appender.append("tasks/a", [b"a"], 0))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert len(streams) == count
        assert streams[-1].cancelled


async def test_a_stream_that_ends_without_an_error_is_one_that_is_gone() -> None:
    class Ended(Silent):
        async def read(self) -> Any:
            return grpc.aio.EOF

        async def code(self) -> Any:
            return grpc.StatusCode.OK

    appender = JournalAppender(lambda **_: Ended(), timeout_s=60.0)
    with pytest.raises(Unavailable, match="storage ended the stream"):
        await appender.append("tasks/a", [b"a"], 0)
