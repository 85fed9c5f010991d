"""Where a member finds storage: as its settings say, as control says, or on the host of control.

The last is a guess, so it counts only once somebody has answered there. A member for which nobody
says more, and nobody answers, would wait for ever without a word; it says what it lacks, and after
a while it ends.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from phalanx.clients.storage import StorageClient
from phalanx.keys.caller import Service
from phalanx.rpc.channel import open_channel
from phalanx.rpc.credentials import ClientKeys
from phalanx.telemetry.logs import get_logger
from phalanx.v1 import coordination_service_pb2 as coordination

STORAGE_PORT = 7420
GUESS_PATIENCE_S = 60.0
"""How long a guessed address may give no answer at all."""
EXIT_UNREACHABLE = 4

_ASK_AGAIN_S = 0.5
_AWAY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)

_log = get_logger(__name__)


class StoragePlace:
    """Finds storage and keeps the client of it. `missing` is set when that is given up."""

    def __init__(self, configured: str, keys: ClientKeys | None = None) -> None:
        self._keys = keys
        self._client: StorageClient | None = None
        self._known = asyncio.Event()
        self._guesses: dict[str, asyncio.Task[None]] = {}
        self._in_vain = 0
        self.missing = asyncio.Event()
        self._why = ""
        if configured:
            self._found(configured)

    def welcomed(self, welcome: coordination.Welcome, dialled: str) -> None:
        """Take in what control says, who was reached at `dialled`. What is known is not replaced:
        neither an address from the settings nor one that answered."""
        if self._client is not None:
            return
        if welcome.storage_address:
            self._found(welcome.storage_address)
            return
        guess = f"{dialled.rpartition(':')[0]}:{STORAGE_PORT}"
        if guess not in self._guesses:
            self._guesses[guess] = asyncio.create_task(self._try(guess, dialled))

    async def client(self) -> StorageClient:
        """Return the client; waits until it is known where storage is."""
        await self._known.wait()
        assert self._client is not None
        return self._client

    def given_up(self, role: str) -> int:
        """Say why this process ends; return its exit code."""
        _log.error("storage_missing", message=self._why)
        print(f"phalanx {role}: {self._why}", file=sys.stderr)
        return EXIT_UNREACHABLE

    async def close(self) -> None:
        """Close the connection."""
        for task in self._guesses.values():
            task.cancel()
        await asyncio.gather(*self._guesses.values(), return_exceptions=True)
        if self._client is not None:
            await self._client.close()

    def _found(self, address: str) -> None:
        self._client = StorageClient(address, keys=self._keys)
        self._known.set()

    async def _try(self, guess: str, dialled: str) -> None:
        """Wait for an answer at the guessed address, but not without an end."""
        untold = (
            f"neither --storage nor control at {dialled} says where storage is, and at "
            f"{guess}, where it would be by default"
        )
        _log.info("storage_guessed", address=guess)
        channel = open_channel(guess, keys=self._keys, service=Service.STORAGE)
        try:
            async with asyncio.timeout(GUESS_PATIENCE_S):
                while not await _answers(channel):
                    if not self._why:
                        self._why = f"{untold}, nobody answers: start this process with --storage"
                        _log.warning("storage_not_told", message=self._why)
                    await asyncio.sleep(_ASK_AGAIN_S)
        except TimeoutError:
            self._in_vain += 1
            # Another one may be where storage is: control has moved in the meantime.
            if self._client is None and self._in_vain == len(self._guesses):
                self.missing.set()
        else:
            if self._client is None:
                self._found(guess)
        finally:
            await channel.close()


async def _answers(channel: grpc.aio.Channel) -> bool:
    """Whether there is a server, whatever it says."""
    stub: Any = health_pb2_grpc.HealthStub(channel)
    try:
        await stub.Check(health_pb2.HealthCheckRequest(), timeout=5.0)
    except grpc.aio.AioRpcError as error:
        return error.code() not in _AWAY
    return True
