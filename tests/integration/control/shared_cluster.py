"""A cluster with keys that several namespaces share, in the event loop of a test."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

from coordinator.control.config import ControlConfig
from coordinator.control.process import ControlProcess
from phalanx.keys.caller import Service
from phalanx.rpc.channel import open_channel
from phalanx.testing.keys import KeyRing
from phalanx.v1 import cluster_service_pb2_grpc, job_service_pb2, job_service_pb2_grpc
from phalanx.v1.job_spec_pb2 import JobSpec
from storage.config import StorageConfig
from storage.runtime import StorageProcess

GUARD_S = 30.0
FAST = {"heartbeat_interval_s": 0.1, "lease_ttl_s": 20.0}
"""No lease runs out while a busy machine holds the process up."""


class SharedCluster:
    """Storage and control processes with keys, in this event loop."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ring = KeyRing(folder / "keys")
        self.controls: list[ControlProcess] = []
        self.storage_address = ""
        self.stack = contextlib.AsyncExitStack()

    async def start(self, controls: int = 1, **settings: Any) -> None:
        storage = StorageProcess(
            StorageConfig(
                id="storage",
                listen="127.0.0.1:0",
                metrics_listen=None,
                state=self.folder / "state",
                **self.ring.flags("storage"),
            )
        )
        await storage.start()
        self.stack.push_async_callback(storage.stop, 0.0)
        self.storage_address = storage.server.address
        for number in range(controls):
            await self._start_control(f"control-{number}", storage.server.address, settings)

    async def _start_control(self, name: str, storage: str, settings: dict[str, Any]) -> None:
        announced = self.folder / f"{name}.json"
        config = ControlConfig(
            id=name,
            listen="127.0.0.1:0",
            metrics_listen=None,
            storage=(storage,),
            announce=announced,
            **{**FAST, **self.ring.flags("control"), **settings},
        )
        control = ControlProcess(config)
        stop = asyncio.Event()
        running = asyncio.create_task(control.run(stop))

        async def end() -> None:
            stop.set()
            await running

        self.stack.push_async_callback(end)
        self.controls.append(control)
        async with asyncio.timeout(GUARD_S):
            while not announced.exists():
                await asyncio.sleep(0.01)

    def channel(self, token: str = "", *, certificate: str = "client", control: int = 0) -> Any:
        keys = self.ring.client(certificate, token)
        address = self.controls[control].server.address
        channel = open_channel(address, keys=keys, service=Service.CONTROL, own_connection=True)
        self.stack.push_async_callback(channel.close)
        return channel

    def jobs(self, token: str, *, control: int = 0) -> Any:
        return job_service_pb2_grpc.JobServiceStub(self.channel(token, control=control))

    def operators(self, token: str) -> Any:
        return cluster_service_pb2_grpc.ClusterServiceStub(self.channel(token))

    def members(self, certificate: str) -> tuple[str, Any]:
        return self.controls[0].server.address, self.ring.client(certificate)


def submission(namespace: str, name: str = "count", **more: Any) -> Any:
    spec = JobSpec(
        namespace=namespace,
        name=name,
        code={"files": {"work.py": "def run(n): return n"}},
        tasks={"entrypoint": "work:run"},
    )
    spec.tasks.arguments.add().update({"n": 1})
    return job_service_pb2.SubmitJobRequest(spec=spec, **more)
