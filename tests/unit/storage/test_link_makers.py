"""Readers that do not die: nobody waits long for one that hangs in the kernel, nor with a lock."""

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from phalanx.errors import DeadlineExceeded, PhalanxError, Unavailable
from storage.links.maker import Makers, Plan

PLAN = Plan("1" * 64, b"no plan", "/data/a.parquet")
SILENT = (sys.executable, "-c", "import socket, time; s = socket.socket(fileno=0); time.sleep(600)")
GUARD_S = 20.0


class Undying(subprocess.Popen[bytes]):
    """A process as it is while it waits for a disk that is gone: no signal ends it."""

    started: list["Undying"]
    waits: list[float | None]
    begun: threading.Event
    watched: Any = None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.started.append(self)
        self.begun.set()

    def kill(self) -> None:
        pass

    def wait(self, timeout: float | None = None) -> int:
        self.waits.append(timeout)
        assert timeout is not None, "a wait without a limit"
        if timeout:
            assert not self.watched._mutex.locked(), "a wait under the lock"
        return super().wait(min(timeout, 0.01))

    def die(self) -> None:
        self.send_signal(signal.SIGKILL)
        super().wait(GUARD_S)


@pytest.fixture(autouse=True)
def undying(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Undying]]:
    monkeypatch.setattr(Undying, "started", [], raising=False)
    monkeypatch.setattr(Undying, "waits", [], raising=False)
    monkeypatch.setattr(Undying, "begun", threading.Event(), raising=False)
    monkeypatch.setattr("storage.links.maker.subprocess.Popen", Undying)
    yield Undying.started
    for process in Undying.started:
        process.die()


def makers(processes: int, timeout_s: float) -> Makers:
    made = Makers([], processes, program=SILENT, timeout_s=timeout_s)
    Undying.watched = made
    return made


def test_one_that_cannot_be_killed_is_left_and_another_one_started(undying: list[Undying]) -> None:
    several = makers(1, 0.01)
    for count in (1, 2):
        with pytest.raises(DeadlineExceeded, match="took longer"):
            several.check(PLAN, 0, 1)
        assert len(undying) == count
        assert several.pids() == []
    # They may keep their memory, so there are only so many.
    with pytest.raises(Unavailable, match="2 processes that read linked files wait for a disk"):
        several.check(PLAN, 0, 1)
    assert len(undying) == 2
    undying[0].die()
    with pytest.raises(DeadlineExceeded):
        several.check(PLAN, 0, 1)
    assert len(undying) == 3
    several.close()


def test_the_end_waits_for_none_that_hangs(undying: list[Undying]) -> None:
    several = makers(1, 600.0)
    answers: list[PhalanxError] = []

    def ask() -> None:
        try:
            several.check(PLAN, 0, 1)
        except PhalanxError as error:
            answers.append(error)

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask)
        assert Undying.begun.wait(GUARD_S)
        several.end()
        asking.result(GUARD_S)
        several.close()
    (error,) = answers
    assert error.reason == "STOPPING"
    assert all(timeout is not None for timeout in Undying.waits)
