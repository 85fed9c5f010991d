"""Where others reach a server that listens on all addresses of its machine."""

import asyncio
import socket

import pytest

from phalanx.rpc.own_address import own_address


@pytest.mark.parametrize("listening", ["127.0.0.1:7430", "10.9.8.7:1", "[::1]:5"])
async def test_a_server_at_one_address_is_reached_there(listening: str) -> None:
    assert await own_address(listening, ["nobody.invalid:1"], asyncio.Event()) == listening


async def test_a_server_at_all_addresses_is_reached_at_the_one_on_the_way_to_its_peer() -> None:
    own = await own_address("0.0.0.0:7430", ["127.0.0.1:7410"], asyncio.Event())
    assert own == "127.0.0.1:7430"
    # An IPv6 socket for all addresses takes calls by IPv4 as well.
    own = await own_address("[::]:7430", ["127.0.0.1:7410"], asyncio.Event())
    assert own == "127.0.0.1:7430"


@pytest.mark.skipif(not socket.has_ipv6, reason="this Python speaks no IPv6")
async def test_an_ipv6_address_keeps_its_brackets() -> None:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            pass
    except OSError as error:
        pytest.skip(f"this machine speaks no IPv6: {error}")
    own = await own_address("[::]:7430", ["[::1]:7410"], asyncio.Event())
    assert own == "[::1]:7430"


async def test_the_first_peer_that_is_known_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    real, asked = loop.getaddrinfo, []

    async def resolve(host: str, *arguments: object, **options: object) -> object:
        asked.append(host)
        if host == "coordinator-1":
            raise socket.gaierror("not there yet")
        return await real("127.0.0.1", *arguments, **options)

    monkeypatch.setattr(loop, "getaddrinfo", resolve)
    peers = ["coordinator-1:7410", "coordinator-2:7410"]
    assert await own_address("0.0.0.0:7430", peers, asyncio.Event()) == "127.0.0.1:7430"
    assert asked == ["coordinator-1", "coordinator-2"]


async def test_who_waits_for_a_name_can_be_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    stop, asked = asyncio.Event(), asyncio.Event()

    async def resolve(*arguments: object, **options: object) -> object:
        asked.set()
        raise socket.gaierror("not there yet")

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolve)
    waiting = asyncio.create_task(own_address("0.0.0.0:7430", ["coordinator:7410"], stop))
    await asked.wait()
    assert not waiting.done()
    stop.set()
    async with asyncio.timeout(20.0):
        assert await waiting == "0.0.0.0:7430"
