"""What ends a block while something does not hold any more."""

from __future__ import annotations

import asyncio

import pytest

from phalanx.errors import Unauthenticated
from phalanx.rpc import standing
from phalanx.rpc.standing import as_long_as

GUARD_S = 20.0


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standing, "LOOK_EVERY_S", 0.001)


@pytest.mark.parametrize("error", [Unauthenticated("revoked"), ValueError("a defect")])
async def test_whatever_the_look_raises_ends_the_block(error: Exception) -> None:
    """Where it cannot be known whether a token holds, it does not."""

    def check() -> None:
        raise error

    with pytest.raises(type(error), match=str(error)):
        async with asyncio.timeout(GUARD_S), as_long_as(check):
            await asyncio.Event().wait()


async def test_a_block_that_runs_out_of_time_by_itself_says_so() -> None:
    with pytest.raises(TimeoutError, match="its own"):
        async with as_long_as(lambda: None):
            raise TimeoutError("its own")
