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
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def ask(self, *names: str) -> None:
        for name in names:
            self._ends[name] = asyncio.Event()
            self._tasks[name] = asyncio.create_task(self._run(name))
        await asyncio.sleep(0)

    async def end(self, name: str) -> None:
        self._ends[name].set()
        await self._tasks[name]
        await asyncio.sleep(0)

    async def cancel(self, name: str) -> None:
        self._tasks[name].cancel()
        with suppress(asyncio.CancelledError):
            await self._tasks[name]
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
    await downloads.ask("a", "b", "c", "d")
    await downloads.cancel("b")
    await downloads.cancel("a")
    assert downloads.begun == ["a", "c"]
    downloads._ends["c"].set()
    # c passes its turn on to d at the moment in which d gives up.
    downloads._tasks["c"].add_done_callback(lambda _: downloads._tasks["d"].cancel())
    await asyncio.wait([downloads._tasks["d"]])
    await downloads.ask("e")
    assert downloads.begun[-1] == "e"
    await downloads.end("e")
