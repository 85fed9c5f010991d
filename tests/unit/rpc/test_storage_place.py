"""Where a member finds storage, and what becomes of one that nobody tells."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from coordinator.aggregation import process as aggregation
from coordinator.aggregation.config import AggregatorConfig
from phalanx.addresses import split_address
from phalanx.config import build
from phalanx.rpc import storage_place
from phalanx.rpc.server import Server
from phalanx.rpc.storage_place import StoragePlace
from phalanx.testing.aggregator_peers import AggregatorControl
from phalanx.testing.worker_peers import ScriptedControl
from phalanx.v1 import coordination_service_pb2 as pb
from worker import main as worker
from worker.config import WorkerConfig

GUARD_S = 30.0
UNTOLD = pb.Welcome()


@pytest.fixture
async def somebody(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[str]:
    """A server at what is storage's usual port in this test; its address."""
    server = Server(listen="127.0.0.1:0", metrics_listen="127.0.0.1:0", service_names=[])
    await server.start()
    monkeypatch.setattr(storage_place, "STORAGE_PORT", split_address(server.address)[1])
    yield server.address
    await server.stop(0)


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody answers at storage's usual port, and that is believed soon."""
    monkeypatch.setattr(storage_place, "STORAGE_PORT", 1)
    monkeypatch.setattr(storage_place, "GUESS_PATIENCE_S", 0.2)


async def address_of(place: StoragePlace) -> str:
    async with asyncio.timeout(GUARD_S):
        return (await place.client()).address


async def test_the_settings_are_not_replaced_by_what_control_says() -> None:
    place = StoragePlace("one:1,two:2")
    place.welcomed(pb.Welcome(storage_address="three:3"), "four:4")
    assert await address_of(place) == "one:1,two:2"
    await place.close()


async def test_it_is_on_the_host_of_control_where_nobody_says_otherwise(somebody: str) -> None:
    place = StoragePlace("")
    place.welcomed(UNTOLD, "127.0.0.1:7410")
    assert await address_of(place) == somebody
    assert not place.missing.is_set()
    await place.close()


async def test_a_guess_is_nothing_beside_what_control_says_later(nobody: None) -> None:
    place = StoragePlace("")
    place.welcomed(UNTOLD, "127.0.0.1:7410")
    place.welcomed(pb.Welcome(storage_address="three:3"), "127.0.0.1:7411")
    assert await address_of(place) == "three:3"
    async with asyncio.timeout(GUARD_S):
        await asyncio.gather(*place._guesses.values())
    assert not place.missing.is_set()
    await place.close()


async def test_a_guess_that_fails_does_not_end_another_one(
    nobody: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control process of the first host is gone; that of the second leads now."""
    answers, asked = asyncio.Event(), asyncio.Event()

    async def comes_late(channel: Any) -> bool:
        if not answers.is_set():
            asked.set()
            return False
        return True

    monkeypatch.setattr(storage_place, "_answers", comes_late)
    place = StoragePlace("")
    place.welcomed(UNTOLD, "127.0.0.1:7410")
    async with asyncio.timeout(GUARD_S):
        await asked.wait()
        monkeypatch.setattr(storage_place, "GUESS_PATIENCE_S", GUARD_S)
        place.welcomed(UNTOLD, "127.0.0.2:7410")
        await place._guesses["127.0.0.1:1"]
        assert not place.missing.is_set()
        answers.set()
        assert await address_of(place) == "127.0.0.2:1"
    await place.close()


async def test_a_worker_that_nobody_tells_says_so_and_ends(
    nobody: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with ScriptedControl() as control:
        flags = {"id": "w1", "control": control.address, "slots": "1", "cache_dir": str(tmp_path)}
        config = build(WorkerConfig, flags, {})
        check_ends(await ended(worker.serve(config, asyncio.Event())), "worker", control, capsys)


async def test_an_aggregator_that_nobody_tells_says_so_and_ends(
    nobody: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aggregation.numeric_fingerprint, "compute", lambda: "f")
    async with AggregatorControl() as control:
        flags = {"id": "a1", "control": control.address, "listen": "127.0.0.1:0"}
        config = build(AggregatorConfig, flags, {})
        code = await ended(aggregation.serve(config, asyncio.Event()))
        check_ends(code, "aggregator", control, capsys)


async def ended(serving: Any) -> int:
    async with asyncio.timeout(GUARD_S):
        return int(await serving)


def check_ends(
    code: int, role: str, control: ScriptedControl, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code == 4
    text = capsys.readouterr().err
    assert f"phalanx {role}: neither --storage nor control at {control.address} says" in text
    assert "at 127.0.0.1:1, where it would be by default, nobody answers" in text
