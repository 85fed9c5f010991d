"""Real control and real storage on port 0, with scripted members.

Both run inside the test's event loop by default; `spawn_control` starts control as a process of its
own, to be killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from coordinator.control.config import ControlConfig
from coordinator.control.process import ControlProcess
from phalanx.data.manifest import ChunkInfo, DatasetManifest, Statistics
from phalanx.rpc.channel import open_channel
from phalanx.testing.members import ScriptedAggregator
from phalanx.v1 import (
    cluster_service_pb2,
    cluster_service_pb2_grpc,
    dataset_service_pb2,
    dataset_service_pb2_grpc,
    job_pb2,
    job_service_pb2,
    job_service_pb2_grpc,
    model_service_pb2_grpc,
    storage_service_pb2_grpc,
)
from phalanx.v1 import coordination_service_pb2 as coordination_pb
from phalanx.v1 import storage_service_pb2 as storage_pb
from phalanx.v1.job_spec_pb2 import JobSpec
from storage.config import StorageConfig
from storage.runtime import StorageProcess

GUARD_S = 30.0
FAST = {"heartbeat_interval_s": 0.1, "lease_ttl_s": 20.0}
"""No lease runs out while a busy machine holds the process up."""


class RealCluster:
    """Storage, control and the stubs to talk to them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.storage: StorageProcess | None = None
        self.storage_address = ""
        self.control: ControlProcess | None = None
        self.control_address = ""
        self.process: asyncio.subprocess.Process | None = None
        self._running: asyncio.Task[None] | None = None
        self._stop = asyncio.Event()
        self._channels: list[Any] = []
        self._spawned = 0

    # -- processes --------------------------------------------------------------------------

    async def start_storage(self, listen: str = "127.0.0.1:0") -> None:
        config = StorageConfig(
            id="storage", listen=listen, metrics_listen=None, state=self.folder / "state"
        )
        self.storage = StorageProcess(config)
        await self.storage.start()
        self.storage_address = self.storage.server.address

    async def stop_storage(self) -> None:
        assert self.storage is not None
        await self.storage.stop(grace_s=0)
        self.storage = None

    async def start_control(self, control_id: str = "control", **settings: Any) -> None:
        """Run control inside this event loop."""
        config = ControlConfig(
            id=control_id,
            listen="127.0.0.1:0",
            metrics_listen="127.0.0.1:0",
            storage=(self.storage_address,),
            announce=self.folder / f"{control_id}.json",
            **{**FAST, **settings},
        )
        assert config.announce is not None
        config.announce.unlink(missing_ok=True)
        self.control = ControlProcess(config)
        self._stop = asyncio.Event()
        self._running = asyncio.create_task(self.control.run(self._stop))
        self.control_address = (await self._announced(config.announce))["address"]

    async def stop_control(self) -> None:
        self._stop.set()
        if self._running is not None:
            async with asyncio.timeout(GUARD_S):
                await self._running
        self._running = None
        await self._close_channels()

    async def spawn_control(self, control_id: str = "control") -> None:
        """Run control as a process of its own."""
        self._spawned += 1
        announced = self.folder / f"{control_id}-{self._spawned}.json"
        flags = {
            "--id": control_id,
            "--listen": "127.0.0.1:0",
            "--storage": self.storage_address,
            "--announce": str(announced),
            "--parent-pid": str(os.getpid()),
            "--heartbeat-interval-s": "0.2",
            "--lease-ttl-s": "3.0",
        }
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            "-m",
            "coordinator",
            "control",
            *[part for flag in flags.items() for part in flag],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
            stderr=asyncio.subprocess.DEVNULL,
        )
        self.control_address = (await self._announced(announced))["address"]

    async def kill_control(self) -> None:
        """End the control process as `kill -9` does."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        await self.process.wait()
        self.process = None
        await self._close_channels()

    async def _announced(self, path: Path) -> dict[str, Any]:
        async with asyncio.timeout(GUARD_S):
            while not path.exists():
                if self._running is not None and self._running.done():
                    self._running.result()
                await asyncio.sleep(0.01)
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    async def close(self) -> None:
        await self._close_channels()
        if self.process is not None:
            await self.kill_control()
        if self._running is not None:
            await self.stop_control()
        if self.storage is not None:
            await self.stop_storage()

    async def _close_channels(self) -> None:
        for channel in self._channels:
            await channel.close()
        self._channels = []

    # -- stubs ------------------------------------------------------------------------------

    def _channel(self, address: str) -> Any:
        channel = open_channel(address, own_connection=True)
        self._channels.append(channel)
        return channel

    def jobs(self) -> Any:
        return job_service_pb2_grpc.JobServiceStub(self._channel(self.control_address))

    def operators(self) -> Any:
        return cluster_service_pb2_grpc.ClusterServiceStub(self._channel(self.control_address))

    def store(self) -> Any:
        return storage_service_pb2_grpc.StorageServiceStub(self._channel(self.storage_address))

    def datasets(self) -> Any:
        return dataset_service_pb2_grpc.DatasetServiceStub(self._channel(self.storage_address))

    def models(self) -> Any:
        return model_service_pb2_grpc.ModelServiceStub(self._channel(self.storage_address))

    # -- what tests do over and over ----------------------------------------------------------

    async def put_blob(self, content: bytes) -> str:
        async def chunks() -> AsyncIterator[storage_pb.PutBlobRequest]:
            yield storage_pb.PutBlobRequest(expected_bytes=len(content), chunk=content)

        answer = await self.store().PutBlob(chunks(), timeout=GUARD_S)
        return str(answer.digest)

    async def add_dataset(self, name: str = "digits") -> None:
        chunk = b"rows" * 1024
        info = ChunkInfo(await self.put_blob(chunk), rows=1024, size_bytes=len(chunk))
        manifest = DatasetManifest(
            format="dense",
            dtype="float32",
            features=8,
            task="classification",
            target="label",
            splits={"train": (info,), "test": (info,)},
            statistics=Statistics(count=1024, mean=(0.0,) * 8, std=(1.0,) * 8),
            classes=("no", "yes"),
        )
        digest = await self.put_blob(manifest.to_json())
        stub = dataset_service_pb2_grpc.DatasetServiceStub(self._channel(self.storage_address))
        request = dataset_service_pb2.CreateDatasetRequest(
            namespace="default", name=name, manifest_digest=digest
        )
        await stub.CreateDataset(request, timeout=GUARD_S)

    async def submit(self, request_id: str = "", **changes: Any) -> job_pb2.Job:
        request = job_service_pb2.SubmitJobRequest(spec=spec(**changes), request_id=request_id)
        return (await self.jobs().SubmitJob(request, timeout=GUARD_S)).job

    async def job(self, job_id: str) -> job_pb2.Job:
        request = job_service_pb2.GetJobRequest(job_id=job_id)
        return (await self.jobs().GetJob(request, timeout=GUARD_S)).job

    async def wait_for_state(self, job_id: str, state: str, reason: str = "") -> job_pb2.Job:
        wanted = job_pb2.Job.State.Value(f"STATE_{state}")
        async with asyncio.timeout(GUARD_S):
            while True:
                try:
                    job = await self.job(job_id)
                except grpc.aio.AioRpcError as error:
                    # A spawned leader that a busy machine held up has lost its lease for a moment.
                    if error.code() != grpc.StatusCode.UNAVAILABLE:
                        raise
                else:
                    if job.state == wanted and (not reason or job.reason == reason):
                        return job
                await asyncio.sleep(0.02)

    async def events(self, job_id: str = "") -> list[job_pb2.Event]:
        request = cluster_service_pb2.ListEventsRequest(job_id=job_id)
        call = self.operators().ListEvents(request, timeout=GUARD_S)
        return [response.event async for response in call]

    async def wait_until_it_answers(self) -> None:
        async with asyncio.timeout(GUARD_S):
            while True:
                try:
                    request = cluster_service_pb2.GetClusterRequest()
                    await self.operators().GetCluster(request, timeout=GUARD_S)
                except grpc.aio.AioRpcError:
                    await asyncio.sleep(0.05)
                else:
                    return

    async def wait_for_event(self, type_: str, job_id: str = "") -> job_pb2.Event:
        async with asyncio.timeout(GUARD_S):
            while True:
                for event in await self.events(job_id):
                    if event.type == type_:
                        return event
                await asyncio.sleep(0.02)

    async def commit(
        self,
        job_id: str,
        step: int,
        term: int = 1,
        *,
        final: bool = False,
        best: dict[str, Any] | None = None,
        best_offset: int = 0,
    ) -> bytes:
        """Commit a checkpoint of the scripted layout as its aggregator would; return the vector.

        At 68 there is another one, for the `best` evaluation that the root tells of.
        """
        parameters = bytes(range(64))
        digest = await self.put_blob(b"head" + parameters + parameters[::-1])
        state: dict[str, Any] = {"metrics": {"test/accuracy": 0.875}, "examples_lost": 8}
        part = storage_pb.CheckpointPart(
            range=0,
            first_element=0,
            element_count=16,
            digest=digest,
            size_bytes=132,
            parameters_offset=4,
            parameters_length=64,
            best_offset=best_offset,
        )
        request = storage_pb.CommitCheckpointRequest(
            job_id=job_id,
            term=term,
            step=step,
            final=final,
            range_count=1,
            part=part,
            root_state=json.dumps(state if best is None else {**state, "best": best}),
            spec_sha256="ef" * 32,
            keep=3,
        )
        answer = await self.store().CommitCheckpoint(request, timeout=GUARD_S)
        assert answer.complete
        return parameters

    async def finish(
        self, aggregator: ScriptedAggregator, job_id: str, step: int = 40, **saved: Any
    ) -> bytes:
        parameters = await self.commit(job_id, step, final=True, **saved)
        aggregator.report(
            job_id,
            step,
            outcome=coordination_pb.JobReport.OUTCOME_STOPPED,
            reason="STOP_EPOCHS",
            metrics={"train/loss": 0.25, "test/accuracy": 0.875},
        )
        return parameters


def spec(**changes: Any) -> JobSpec:
    """A small job; `changes` are fields of JobSpec."""
    result = JobSpec(name="job")
    result.data.name = "digits"
    result.data.shards = 8
    result.train.model.logistic_regression.SetInParent()
    result.train.batch_size = 512
    for name, value in changes.items():
        if isinstance(value, str | int):
            setattr(result, name, value)
        else:
            getattr(result, name).CopyFrom(value)
    return result


@pytest.fixture
def make_spec() -> Any:
    """The function that makes a small valid spec."""
    return spec


@pytest.fixture
async def storage_only(tmp_path: Path) -> AsyncIterator[RealCluster]:
    """Storage with a data set; control is for the test to start."""
    made = RealCluster(tmp_path)
    await made.start_storage()
    try:
        await made.add_dataset()
        yield made
    finally:
        with contextlib.suppress(Exception):
            await made.close()


@pytest.fixture
async def cluster(storage_only: RealCluster) -> RealCluster:
    """Storage with a data set, and control."""
    await storage_only.start_control()
    return storage_only
