"""What the health service says while the database comes and goes."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator

import pytest

from phalanx.errors import PhalanxError, Unavailable
from storage.service import readiness

GUARD_S = 30.0


class Database:
    """Answers, raises or hangs, and says what was made of it."""

    def __init__(self) -> None:
        self.error: PhalanxError | None = None
        self.answers = threading.Event()
        self.answers.set()
        self.said: asyncio.Queue[bool] = asyncio.Queue()
        self.asked = 0

    def check(self) -> None:
        self.asked += 1
        assert self.answers.wait(GUARD_S)
        if self.error is not None:
            raise self.error


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "INTERVAL_S", 0.0)
    monkeypatch.setattr(readiness, "SILENCE_S", GUARD_S)


@contextlib.asynccontextmanager
async def watched(database: Database) -> AsyncIterator[None]:
    watching = asyncio.create_task(
        readiness.show_readiness(database.check, database.said.put_nowait)
    )
    try:
        async with asyncio.timeout(GUARD_S):
            yield
    finally:
        database.answers.set()
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching


@pytest.mark.usefixtures("at_once")
async def test_it_is_told_once_that_it_is_away_and_once_that_it_is_back() -> None:
    database = Database()
    async with watched(database):
        for _ in range(2):
            database.error = Unavailable("gone")
            assert await database.said.get() is False
            asked = database.asked
            while database.asked < asked + 3:
                await asyncio.sleep(0)
            assert database.said.empty()
            database.error = None
            assert await database.said.get() is True


@pytest.mark.usefixtures("at_once")
async def test_silence_is_absence_and_one_question_is_out_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(readiness, "SILENCE_S", 0.02)
    database = Database()
    async with watched(database):
        database.answers.clear()
        assert await database.said.get() is False
        asked = database.asked
        await asyncio.to_thread(lambda: None)
        assert database.asked == asked
        database.answers.set()
        assert await database.said.get() is True
