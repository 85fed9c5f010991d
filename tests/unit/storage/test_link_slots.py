"""Turns at the readers of linked files."""

import asyncio

import pytest

from phalanx.errors import Unavailable
from storage.links import slots
from storage.links.slots import Slots


async def turns(several: Slots, keys: str, seen: list[str], may_end: asyncio.Event) -> None:
    async def take(key: str) -> None:
        async with several.of(key):
            seen.append(key)
            await may_end.wait()

    async with asyncio.TaskGroup() as group:
        for key in keys:
            group.create_task(take(key))
        for _ in range(3):
            await asyncio.sleep(0)
        seen.append("|")
        may_end.set()


@pytest.mark.parametrize(("count", "first"), [(1, "ab"), (2, "ab"), (3, "aab"), (4, "aaab")])
async def test_one_key_leaves_a_slot_to_others(count: int, first: str) -> None:
    several, seen = Slots(count), list[str]()
    await turns(several, "aaaaab", seen, asyncio.Event())
    assert "".join(seen) == f"{first}|" + "a" * (6 - len(first))
    # Nothing is kept of who has nothing any more.
    assert not several._turns
    assert not several._inside


async def test_only_so_many_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "WAITING_MAX", 3)
    several = Slots(2)
    with pytest.raises(ExceptionGroup) as caught:
        await turns(several, "aaaaa", [], asyncio.Event())
    (error,) = caught.value.exceptions
    assert isinstance(error, Unavailable)
    assert error.reason == "TOO_MANY_READS"
    assert error.retry_after_s == 1.0
    await turns(several, "aaaa", [], asyncio.Event())
