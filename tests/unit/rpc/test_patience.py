"""Trying again: waits that grow, limits, and a clock that only sleep moves."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from phalanx.errors import NotFound, PhalanxError, ResourceExhausted, Unavailable
from phalanx.rpc import patience
from phalanx.rpc.patience import Patience, insist

AWAY = Unavailable("storage is away")


class Clock:
    """Time goes on only in sleep and in attempts."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.slept: list[float] = []
        self.jitter = 1.0

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now_s += seconds

    def uniform(self, low: float, high: float) -> float:
        assert (low, high) == (0.5, 1.0)
        return self.jitter


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    made = Clock()
    monkeypatch.setattr(patience, "time", SimpleNamespace(monotonic=lambda: made.now_s))
    monkeypatch.setattr(patience, "asyncio", SimpleNamespace(sleep=made.sleep))
    monkeypatch.setattr(patience, "random", SimpleNamespace(uniform=made.uniform))
    return made


class Server:
    """Fails with these errors, one after another, then answers; each attempt takes some time."""

    def __init__(self, clock: Clock, *errors: Exception, takes_s: float = 0.0) -> None:
        self._clock = clock
        self._errors = list(errors)
        self._takes_s = takes_s
        self.attempts = 0

    async def __call__(self) -> str:
        self.attempts += 1
        self._clock.now_s += self._takes_s
        if self._errors:
            raise self._errors.pop(0)
        return "answer"


async def test_what_works_at_once_waits_for_nothing(clock: Clock) -> None:
    assert await insist(Server(clock), Patience(0.1, 2.0)) == "answer"
    assert clock.slept == []


async def test_waits_double_up_to_the_longest(clock: Clock) -> None:
    server = Server(clock, *[AWAY] * 7)
    assert await insist(server, Patience(0.1, 2.0)) == "answer"
    assert clock.slept == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0])


async def test_chance_cuts_every_wait_and_not_its_growth(clock: Clock) -> None:
    clock.jitter = 0.5
    await insist(Server(clock, AWAY, AWAY, AWAY), Patience(1.0, 3.0))
    assert clock.slept == pytest.approx([0.5, 1.0, 1.5])


async def test_an_error_that_does_not_pass_ends_it_at_once(clock: Clock) -> None:
    server = Server(clock, AWAY, NotFound("it is not there"), AWAY)
    with pytest.raises(NotFound):
        await insist(server, Patience(0.1, 2.0))
    assert server.attempts == 2


async def test_defects_are_not_tried_again(clock: Clock) -> None:
    server = Server(clock, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        await insist(server, Patience(0.1, 2.0))
    assert clock.slept == []


async def test_callers_say_what_passes(clock: Clock) -> None:
    full = ResourceExhausted("the disk is full")
    with pytest.raises(ResourceExhausted):
        await insist(Server(clock, full), Patience(0.1, 2.0))
    known: tuple[type[PhalanxError], ...] = (ResourceExhausted,)
    passes = lambda error: isinstance(error, known)  # noqa: E731
    assert await insist(Server(clock, full), Patience(0.1, 2.0), passes=passes) == "answer"


async def test_the_number_of_attempts_ends_it(clock: Clock) -> None:
    server = Server(clock, *[AWAY] * 9)
    with pytest.raises(Unavailable):
        await insist(server, Patience(0.1, 2.0, attempts_max=3))
    assert server.attempts == 3
    assert len(clock.slept) == 2


async def test_no_wait_goes_beyond_the_limit(clock: Clock) -> None:
    """Attempts of 1 s and waits of 1, 2 and 4 s: the fourth attempt would begin at 10 s."""
    server = Server(clock, *[AWAY] * 9, takes_s=1.0)
    began_s = clock.now_s
    with pytest.raises(Unavailable):
        await insist(server, Patience(1.0, 60.0, limit_s=9.9))
    assert clock.slept == [1.0, 2.0]
    assert clock.now_s == began_s + 6.0
    again = Server(clock, *[AWAY] * 3, takes_s=1.0)
    assert await insist(again, Patience(1.0, 60.0, limit_s=10.1)) == "answer"


async def test_every_failure_after_which_it_is_tried_again_is_told(clock: Clock) -> None:
    told: list[tuple[str, int]] = []
    server = Server(clock, AWAY, AWAY, AWAY)
    with pytest.raises(Unavailable):
        await insist(
            server,
            Patience(0.1, 2.0, attempts_max=3),
            on_failure=lambda error, number: told.append((error.message, number)),
        )
    assert told == [(AWAY.message, 1), (AWAY.message, 2)]


@pytest.mark.parametrize(("first_s", "longest_s"), [(0.0, 1.0), (2.0, 1.0)])
def test_waits_must_be_able_to_grow(first_s: float, longest_s: float) -> None:
    with pytest.raises(ValueError, match="do not grow"):
        Patience(first_s, longest_s)
