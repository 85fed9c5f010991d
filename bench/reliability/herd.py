"""A herd of workers that come back at once after control was killed."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from bench.reliability.rows import Row, Rows
from phalanx.ids import new_incarnation
from phalanx.local.ports import free_ports
from phalanx.rpc.member_session import MemberSession
from phalanx.testing.proxied_cluster import ServiceProcess
from phalanx.testing.storage_process import StorageProcess
from phalanx.v1 import coordination_service_pb2 as pb

WORKERS = 200
CLIENT_PROCESSES = 4
TRIALS = 5
REACH_S = 10.0
GUARD_S = 120.0


def run(command: str, *, quick: bool) -> list[Row]:
    """Seconds from the kill until every worker is registered."""
    trials = 2 if quick else TRIALS
    registered = []
    with (
        tempfile.TemporaryDirectory() as folder,
        StorageProcess(Path(folder) / "state") as storage,
        _control_process(Path(folder), storage.address) as control,
        _Herd(control.address) as herd,
    ):
        herd.wait_for_all(after_unix_s=0.0)
        for _ in range(trials):
            killed_unix_s = time.time()
            control.restart()
            registered.append([at - killed_unix_s for at in herd.wait_for_all(killed_unix_s)])
    first = max(min(times) for times in registered)
    return [
        Rows(command, quick).largest(
            "herd_registered_s",
            f"control `kill -9` and restart → all {WORKERS} workers registered again",
            [max(times) for times in registered],
            "s",
            REACH_S,
            f"the first came after {first:.1f} s at the latest",
        )
    ]


@contextmanager
def _control_process(folder: Path, storage: str) -> Iterator[ServiceProcess]:
    """A control process on a fixed port."""
    listen = f"127.0.0.1:{free_ports(1)[0]}"
    arguments = ("coordinator", "control", "--listen", listen, "--storage", storage)
    control = ServiceProcess("control", arguments, folder)
    try:
        control.wait_until_ready()
        yield control
    finally:
        control.kill()


class _Herd:
    """Worker sessions in a few processes, which write down when each was welcomed."""

    def __init__(self, control: str) -> None:
        share = WORKERS // CLIENT_PROCESSES
        self._files = tempfile.TemporaryDirectory()
        self._paths = [Path(self._files.name) / str(index) for index in range(CLIENT_PROCESSES)]
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-P", "-m", "bench.reliability.herd"],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,  # each lost session is logged
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
                    "HERD": json.dumps([control, index * share, share, str(path)]),
                },
            )
            for index, path in enumerate(self._paths)
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.communicate()
        self._files.cleanup()

    def wait_for_all(self, after_unix_s: float) -> list[float]:
        """Wait until every worker was welcomed after a moment; return when each was first."""
        deadline = time.monotonic() + GUARD_S
        while True:
            welcomed: dict[str, float] = {}
            for path in self._paths:
                for line in path.read_text().splitlines() if path.exists() else ():
                    worker, _, at = line.partition(" ")
                    if at.endswith(";") and float(at[:-1]) > after_unix_s:
                        welcomed.setdefault(worker, float(at[:-1]))
            if len(welcomed) == WORKERS:
                return list(welcomed.values())
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(welcomed)} of {WORKERS} workers came back")
            time.sleep(0.05)


async def _serve_herd(control: str, first: int, count: int, path: Path) -> None:
    with path.open("a", buffering=1) as welcomed:
        sessions = [_session(control, f"worker-{first + n}", welcomed) for n in range(count)]
        for session in sessions:
            session.start()
        await asyncio.to_thread(sys.stdin.read)
        await asyncio.gather(*(session.close() for session in sessions))


def _session(control: str, worker_id: str, welcomed: Any) -> MemberSession:
    """The very session of a worker, with nothing behind it."""
    incarnation = new_incarnation()
    seen: Counter[str] = Counter()

    def hello() -> pb.SessionRequest:
        return pb.SessionRequest(
            worker_hello=pb.WorkerHello(
                worker_id=worker_id,
                incarnation=incarnation,
                fingerprint="herd",
                slots=1,
                memory_bytes=2**34,
                generation=seen["generation"],
            )
        )

    def heartbeat() -> pb.Heartbeat:
        return pb.Heartbeat(resident_bytes=2**27)

    def on_message(message: pb.SessionResponse) -> None:
        seen["generation"] = message.generation

    def on_open(_: pb.Welcome) -> None:
        welcomed.write(f"{worker_id} {time.time():.6f};\n")

    return MemberSession([control], hello, heartbeat, on_message, on_open)


if __name__ == "__main__":
    _control, _first, _count, _path = json.loads(os.environ["HERD"])
    asyncio.run(_serve_herd(_control, _first, _count, Path(_path)))
