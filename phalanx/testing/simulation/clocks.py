"""Gives the modules of the services virtual clocks, seeded chance and the simulated network.

Modules reach the machine through names: `time.monotonic()`, `random.uniform(…)`,
`grpc.aio.insecure_channel(…)`. Inside `environment()` those names lead to the running world, and
afterwards they are what they were.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grpc.aio

from phalanx.testing.simulation.loop import World
from phalanx.testing.simulation.network import Network
from phalanx.testing.simulation.rpc import SimulatedServer
from phalanx.testing.simulation.rpc_client import SimulatedChannel

EPOCH_NS = 1_700_000_000 * 1_000_000_000
"""Wall time at which every run begins."""

_PACKAGES = ("coordinator", "phalanx", "storage", "worker")
_MISSING = object()


class Environment:
    """Replaces names of modules while it is open; the world may be changed in between."""

    def __init__(self) -> None:
        self.world: World | None = None
        self.network: Network | None = None
        self._undo: list[tuple[Any, str, Any]] = []

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Replace one attribute until the end."""
        self._undo.append((owner, name, getattr(owner, name, _MISSING)))
        setattr(owner, name, value)

    def close(self) -> None:
        """Put everything back."""
        while self._undo:
            owner, name, value = self._undo.pop()
            if value is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, value)

    def use(self, world: World, network: Network) -> None:
        """Have everything lead to this world from now on."""
        self.world, self.network = world, network

    def install(self) -> None:
        """Replace clocks, chance and gRPC in all modules of the services that are loaded."""
        facades: dict[Any, Any] = {
            time: _Time(self),
            random: _Random(self),
            secrets: _Secrets(self),
            os: _Os(self),
            socket: _Socket(),
        }
        for name, module in list(sys.modules.items()):
            if name.partition(".")[0] not in _PACKAGES or name.startswith("phalanx.testing"):
                continue
            for attribute in ("time", "random", "secrets", "os", "socket"):
                facade = facades.get(getattr(module, attribute, None))
                if facade is not None:
                    self.replace(module, attribute, facade)
            if getattr(module, "_log", None) is not None:
                self.replace(module, "_log", _Log(self, name))
        self.replace(grpc.aio, "insecure_channel", self._channel)
        self.replace(grpc.aio, "server", self._server)

    def _channel(self, target: str, **_: Any) -> Any:
        assert self.world is not None
        assert self.network is not None
        return SimulatedChannel(self.world, self.network, target)

    def _server(self, interceptors: Sequence[Any] | None = None, **more: Any) -> Any:
        assert self.world is not None
        assert self.network is not None
        return SimulatedServer(self.world, self.network, interceptors)


@contextlib.contextmanager
def environment(*installers: Callable[[Environment], None]) -> Iterator[Environment]:
    """An environment for as long as the block runs."""
    made = Environment()
    try:
        made.install()
        for install in installers:
            install(made)
        yield made
    finally:
        made.close()


class _Facade:
    def __init__(self, environment: Environment) -> None:
        self._environment = environment

    @property
    def _world(self) -> World:
        world = self._environment.world
        assert world is not None, "no world is in use"
        return world


class _Time(_Facade):
    """Monotonic clocks are right everywhere; wall clocks are as wrong as faults make them."""

    def monotonic(self) -> float:
        world = self._environment.world
        assert world is not None, "no world is in use"
        return world.loop.now_s

    perf_counter = monotonic

    def monotonic_ns(self) -> int:
        return int(self._world.loop.now_s * 1e9)

    def time_ns(self) -> int:
        loop = self._world.loop
        return EPOCH_NS + int(loop.now_s * 1e9) + loop.current.wall_offset_ns

    def time(self) -> float:
        return self.time_ns() / 1e9


class _Random(_Facade):
    def __getattr__(self, name: str) -> Any:
        return getattr(self._world.jitter, name)


class _Secrets(_Facade):
    def choice(self, choices: Sequence[Any]) -> Any:
        return self._world.jitter.choice(choices)

    def token_hex(self, count: int = 16) -> str:
        return self._world.jitter.randbytes(count).hex()


class _Os(_Facade):
    def getpid(self) -> int:
        return 10_000_000 + self._world.loop.current.number

    def __getattr__(self, name: str) -> Any:
        if name == "_exit":
            return lambda _: self._world.end_self()
        return getattr(os, name)


class _Socket:
    def gethostname(self) -> str:
        return "simulated"

    def __getattr__(self, name: str) -> Any:
        return getattr(socket, name)


class _Log(_Facade):
    """Logs are shown to who replays a run, and cost nothing otherwise."""

    def __init__(self, environment: Environment, module: str) -> None:
        super().__init__(environment)
        self._module = module.rpartition(".")[2]

    def debug(self, event: str, **values: Any) -> None:
        pass

    def info(self, event: str, **values: Any) -> None:
        world = self._environment.world
        if world is not None and world.log is not None:
            told = " ".join(f"{name}={value}" for name, value in values.items() if value)
            world.say(f"  {world.loop.current.name}: {self._module}: {event} {told}"[:300])

    warning = error = critical = exception = info
