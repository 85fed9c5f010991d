"""The loop of the simulator: what ends with a process, and in which order things happen."""

from __future__ import annotations

import asyncio
import gc
import warnings

from phalanx.testing.simulation import World


def test_what_a_killed_process_begins_while_it_is_cleaned_up_is_closed_too():
    world = World(1)
    closed: list[str] = []
    never = asyncio.Event()  # kept: what nobody else knows of, the collector may end at any time

    async def remove() -> None:
        closed.append("begun")

    async def main() -> None:
        try:
            await never.wait()
        finally:
            closed.append("cleaned up")
            await asyncio.shield(asyncio.ensure_future(remove()))

    process = world.start("one", main)
    world.run(until_s=1.0)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        world.kill(process)
        world.close()
        del process
        gc.collect()
    assert closed == ["cleaned up"]
    assert [str(each.message) for each in told] == []


def test_what_a_killed_process_had_not_begun_when_it_was_paused_is_closed_too():
    world = World(1)

    async def main() -> None:
        raise AssertionError("it runs nothing any more")

    process = world.start("one", main)
    world.pause(process)
    world.run(until_s=1.0)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        world.kill(process)
        world.close()
        del process
        gc.collect()
    assert [str(each.message) for each in told] == []


def test_callbacks_of_one_instant_run_in_the_order_in_which_they_were_scheduled():
    world = World(1)
    ran: list[str] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.call_later(1.0, ran.append, "second")
        loop.call_later(0.5, ran.append, "first")
        loop.call_later(1.0, ran.append, "third").cancel()
        loop.call_at(1.0, ran.append, "fourth")
        loop.call_later(-1.0, ran.append, "at once")
        end = asyncio.Event()
        loop.call_later(5.0, end.set)
        await end.wait()

    process = world.start("one", main)
    world.run(until_s=0.75)
    assert (ran, world.now_s) == (["at once", "first"], 0.75)
    world.pause(process)
    world.run(until_s=2.0)
    world.resume(process)
    assert ran == ["at once", "first"]
    world.run(until_s=2.0)
    assert ran == ["at once", "first", "second", "fourth"]
    world.run(until_s=9.0, ended=lambda: not process.alive)
    assert (process.alive, world.now_s) == (False, 9.0)
    world.close()
