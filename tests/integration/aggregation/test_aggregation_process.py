"""`python -P -m coordinator aggregator` as a process."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from phalanx.testing.aggregator_peers import AggregatorControl

READY_S = 60.0
"""A guard against a hang."""


async def spawn(*arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "coordinator", "aggregator"),
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


@pytest.fixture
async def process(control, tmp_path):
    """A running process, its announcement and its session."""
    announcement = tmp_path / "announce.json"
    child = await spawn(
        *("--id", "a1", "--listen", "127.0.0.1:0", "--control", control.address),
        *("--announce", str(announcement), "--parent-pid", str(os.getpid())),
    )
    try:
        async with asyncio.timeout(READY_S):
            session = await control.next_session()
            while not announcement.exists():
                await asyncio.sleep(0.02)
        yield child, json.loads(announcement.read_text()), session
    finally:
        if child.returncode is None:
            child.kill()
        await child.communicate()


async def test_it_announces_serves_and_ends_on_sigterm(process):
    child, announced, session = process
    assert announced["role"] == "aggregator"
    assert (announced["id"], announced["pid"]) == ("a1", child.pid)
    assert session.hello.address == announced["address"]
    assert len(session.hello.fingerprint) == 64
    async with grpc.aio.insecure_channel(announced["address"]) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest()
        answer = await health.Check(request, timeout=10)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    child.send_signal(signal.SIGTERM)
    async with asyncio.timeout(READY_S):
        assert await child.wait() == 0


async def test_it_ignores_a_broken_control_and_waits_for_another(process, control):
    child, _, session = process
    session.break_off()
    assert (await control.next_session()).hello.incarnation == session.hello.incarnation
    assert child.returncode is None


async def test_a_port_in_use_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        child = await spawn("--listen", address)
        async with asyncio.timeout(READY_S):
            _, errors = await child.communicate()
    assert child.returncode == 2
    assert address in errors.decode()


async def test_wrong_flags_are_named():
    child = await spawn("--control", "nowhere", "--listen", "x")
    async with asyncio.timeout(READY_S):
        _, errors = await child.communicate()
    assert child.returncode == 2
    assert "--control" in errors.decode()
    assert "--listen" in errors.decode()


@pytest.fixture
async def control():
    async with AggregatorControl() as scripted:
        yield scripted
