"""Which download runs next."""

import asyncio
from contextlib import suppress

from worker.turns import Turns


class Downloads:
    """Downloads that end when they are told to."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self.begun: list[str] = []
        self._ends: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def ask(self, *names: str) -> None:
        for name in names:
            self._ends[name] = asyncio.Event()
            self.tasks[name] = asyncio.create_task(self._run(name))
        await asyncio.sleep(0)

    async def end(self, name: str) -> None:
        self._ends[name].set()
        await self.tasks[name]
        await asyncio.sleep(0)

    async def cancel(self, name: str) -> None:
        self.tasks[name].cancel()
        with suppress(asyncio.CancelledError):
            await self.tasks[name]
        await asyncio.sleep(0)

    async def _run(self, name: str) -> None:
        async with self._turns.turn(name):
            self.begun.append(name)
            await self._ends[name].wait()


async def test_what_somebody_waits_for_goes_before_what_is_read_ahead() -> None:
    turns = Turns(2)
    downloads = Downloads(turns)
    await downloads.ask("a", "b", "c", "d", "e")
    turns.hurry("e")
    assert downloads.begun == ["a", "b"]
    await downloads.end("b")
    assert downloads.begun == ["a", "b", "e"]
    for name in ("a", "e", "c", "d"):
        await downloads.end(name)
    assert downloads.begun == ["a", "b", "e", "c", "d"]
    await downloads.ask("f", "g", "h")
    assert downloads.begun[5:] == ["f", "g"]
    for name in ("f", "g", "h"):
        await downloads.end(name)


async def test_hurry_is_over_with_the_download() -> None:
    turns = Turns(1)
    downloads = Downloads(turns)
    turns.hurry("a")
    await downloads.ask("a")
    await downloads.end("a")
    await downloads.ask("b", "c", "a")
    await downloads.end("b")
    assert downloads.begun == ["a", "b", "c"]
    for name in ("c", "a"):
        await downloads.end(name)


async def test_no_turn_is_lost_with_those_who_give_up() -> None:
    turns = Turns(1)
    downloads = Downloads(turns)
    await downloads.ask("a", "b", "c")
    await downloads.cancel("b")
    await downloads.cancel("a")
    assert downloads.begun == ["a", "c"]
    await downloads.end("c")


async def test_a_turn_that_comes_to_one_who_gives_up_at_that_moment_goes_on() -> None:
    turns = Turns(1)
    downloads = Downloads(turns)
    end = asyncio.Event()

    async def first() -> None:
        async with turns.turn("a"):
            await end.wait()
        # The turn of b has come, but b has not woken up yet.
        downloads.tasks["b"].cancel()

    holder = asyncio.create_task(first())
    await asyncio.sleep(0)
    await downloads.ask("b", "c")
    end.set()
    await holder
    await asyncio.wait([downloads.tasks["b"]])
    await asyncio.sleep(0)
    assert downloads.begun == ["c"]
    await downloads.end("c")
