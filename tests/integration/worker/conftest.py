"""A worker in this process (its leaf processes are real) between scripted peers."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from phalanx.blas import one_blas_thread
from phalanx.data.chunks import encode_dense
from phalanx.data.manifest import ChunkInfo, DatasetManifest, Statistics
from phalanx.data.reader import ChunkReader
from phalanx.errors import NotFound
from phalanx.frames import frame_grid, split_ranges
from phalanx.models import DataSchema, build_model
from phalanx.reduction import Node, reduce_leaves
from phalanx.telemetry.metrics import WorkerMetrics, new_registry
from phalanx.training.leaf import run_evaluation_leaf, run_leaf
from phalanx.v1 import coordination_service_pb2 as coordination
from phalanx.v1 import job_spec_pb2, training_pb2
from worker.config import WorkerConfig
from worker.session.app import Session

GoRecord = training_pb2.GoRecord

FICKLE = '''
"""A model that does what its arguments say when a leaf holds a certain row."""

import ctypes
import faulthandler
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time

import numpy as np

from phalanx.models import UserModel
from phalanx.models.base import DeviceLost


def multiplied_in_a_child():
    """Whether threads and processes of user code work."""
    program = [sys.executable, "-c", "import phalanx; print(6 * 7)"]
    found = []
    thread = threading.Thread(target=lambda: found.append(subprocess.check_output(program)))
    thread.start()
    thread.join()
    return int(found[0])


def stopped_children():
    """How a program and a copy of this process end that are told to."""
    program = subprocess.Popen(["sleep", "60"])
    reader, writer = os.pipe()
    copy = os.fork()
    if copy == 0:
        os.write(writer, b".")
        time.sleep(60)
        os._exit(0)
    os.read(reader, 1)
    program.terminate()
    os.kill(copy, signal.SIGTERM)
    return [program.wait(), os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1])]


def faults_of_rows_again():
    """Pages that the kernel has to clear for rows of a second step, where those of the first were
    of the same size and are no longer needed."""
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        rows = [np.ones(1 << 17) for _ in range(16)]
        del rows
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


class Fickle(UserModel):
    def __init__(self, schema, elements=3, row=-1, act="", hold_s=10):
        super().__init__(schema, {"w": (elements,)})
        self.row, self.act, self.hold_s = row, act, hold_s

    @property
    def numeric_fingerprint(self):
        """With `differ` as if GPUs of other names were of other kinds."""
        return os.environ["CUDA_VISIBLE_DEVICES"] if self.act == "differ" else ""

    def differ(self):
        pass

    def initial(self, seed):
        return {"w": np.arange(self.layout.element_count, dtype=np.float32)}

    def loss_and_gradients(self, parameters, features, targets):
        w = parameters["w"]
        if (features[:, 0] == self.row).any():
            getattr(self, self.act)()
            if self.act == "infinite":
                return 1.0, {"w": w + np.inf}
        total = features[:, 1].sum(dtype=np.float32)
        return float(total), {"w": w * np.float32(0.5) + total}

    def infinite(self):
        pass

    def raise_error(self):
        raise ValueError("this row is cursed")

    def lose_device(self):
        raise DeviceLost("the GPU is gone")

    def leave(self):
        sys.exit(3)

    def crash(self):
        os.kill(os.getpid(), signal.SIGSEGV)

    def orphan(self):
        # Its leaf server, and with that all leaf processes of the worker.
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)

    def split(self):
        os.fork()

    def split_and_leave(self):
        if os.fork() == 0:
            sys.exit(3)

    def split_and_raise(self):
        child = os.fork()
        if child == 0:
            raise ValueError("raised in the copy")
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1

    def share_out(self):
        with multiprocessing.get_context("fork").Pool(2) as pool:
            assert pool.map(abs, [-1, -2, -3]) == [1, 2, 3]

    def vanish(self):
        os._exit(9)

    def hang(self):
        while True:
            time.sleep(60)

    def nap(self):
        print("about to nap")
        time.sleep(1)

    def hold(self):
        # One call that keeps the interpreter: no other thread of the process runs meanwhile.
        ctypes.PyDLL(None).usleep(int(self.hold_s * 1_000_000))

    def devour(self):
        np.ones(1 << 30, np.uint8)

    def talk(self):
        print("said by the leaf")
        print("complained by the leaf", file=sys.stderr)
        os.write(1, b"said without Python\\n")

    def tell(self):
        """What user code may notice of the process that it runs in."""
        facts = {
            "drawn": [random.random(), np.random.random()],
            "folder": os.getcwd(),
            "path": sys.path,
            "threads": os.environ["OPENBLAS_NUM_THREADS"],
            "workspace": os.environ["CUBLAS_WORKSPACE_CONFIG"],
            "gpus": os.environ["CUDA_VISIBLE_DEVICES"],
            "read": sys.stdin.read(),
            "session": os.getsid(0) == os.getpid(),
            "core": resource.getrlimit(resource.RLIMIT_CORE)[0],
            "faults": faulthandler.is_enabled(),
            "secret": os.environ.get("PGPASSWORD", ""),
            "told": b"canary-7" in open("/proc/self/environ", "rb").read(),
            "multiplied": multiplied_in_a_child(),
            "stopped": stopped_children(),
            "faulted": faults_of_rows_again(),
        }
        print("facts", json.dumps(facts))


def build(schema, **arguments):
    return Fickle(schema, **arguments)
'''


class Bench:
    """Blobs, a data set, a job, and workers that run it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.blobs: dict[str, bytes] = {}
        self.downloads: list[str] = []
        self.sessions: list[Session] = []
        self.storage_up = asyncio.Event()
        self.storage_up.set()
        self.plan = training_pb2.JobPlan()
        self.ranges: list[training_pb2.ParameterRange] = []

    def put(self, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        self.blobs[digest] = data
        return digest

    def dataset(self, rows: int = 64, features: int = 5, classes: int = 3) -> DatasetManifest:
        """Rows numbered in feature 0; two chunks for training, one for test."""
        random = np.random.default_rng(7)
        values = random.standard_normal((rows + rows // 4, features)).astype(np.float32)
        values[:, 0] = np.arange(len(values))
        targets = random.integers(0, classes, len(values)).astype(np.int64)
        bounds = [(0, rows // 3), (rows // 3, rows), (rows, len(values))]
        infos = []
        for first, stop in bounds:
            data = encode_dense(values[first:stop], targets[first:stop])
            infos.append(ChunkInfo(self.put(data), stop - first, len(data)))
        return DatasetManifest(
            format="dense",
            dtype="float32",
            features=features,
            task="classification",
            target="label",
            splits={"train": tuple(infos[:2]), "test": (infos[2],)},
            statistics=Statistics(
                rows,
                tuple(values[:rows].mean(0).tolist()),
                tuple(values[:rows].std(0).tolist()),
                tuple(values[:rows].min(0).tolist()),
                tuple(values[:rows].max(0).tolist()),
            ),
            classes=tuple(str(index) for index in range(classes)),
        )

    def job(
        self,
        shards: int = 4,
        custom: dict[str, Any] | None = None,
        rows: int = 64,
        range_count: int = 1,
        hidden: int = 6,
    ) -> training_pb2.JobPlan:
        """Plan a job: an MLP, or Fickle with these arguments."""
        manifest = self.dataset(rows)
        spec = job_spec_pb2.JobSpec(name="job", seed=11)
        spec.data.split = "train"
        spec.data.shards = shards
        spec.train.dtype = "float32"
        spec.train.l2 = 0.001
        spec.train.evaluation.split = "test"
        if custom is None:
            spec.train.model.mlp.hidden.append(hidden)
            spec.train.model.mlp.activation = "relu"
            spec.train.model.mlp.loss = "cross_entropy"
            spec.train.model.standardise = True
        else:
            spec.train.model.custom.entrypoint = "fickle:build"
            spec.train.model.custom.arguments.update(custom)
            spec.train.model.standardise = False
        plan = training_pb2.JobPlan(
            job_id="job-22222222",
            spec=spec.SerializeToString(deterministic=True),
            shards=shards,
            train_rows=rows,
            # Fickle sees all of its shard in every step.
            rows_per_leaf=max(1, rows // shards // (2 if custom is None else 1)),
            steps_per_epoch=2 if custom is None else 1,
            evaluation_shards=2,
            evaluation_rows=rows // 4,
            manifest_digest=self.put(manifest.to_json()),
        )
        if custom is not None:
            plan.code_digests["fickle.py"] = self.put(FICKLE.encode())
            elements = int(custom.get("elements", 3))
            plan.layout.tensors.add(name="w", shape=[elements], decay=False)
            plan.layout.dtype = "float32"
            plan.layout.element_count = elements
            plan.evaluation_sums.append("loss")
        else:
            model = build_model(spec, DataSchema(manifest.features, len(manifest.classes)))
            plan.layout.CopyFrom(model.layout)
            plan.evaluation_sums.extend(model.evaluation_sums)
        plan.range_count = range_count
        self.plan = plan
        return plan

    def own(self, *aggregators: Any) -> None:
        """Give each aggregator one range of the job."""
        count = self.plan.layout.element_count
        cuts = split_ranges(count, len(aggregators))
        self.ranges = [
            training_pb2.ParameterRange(
                index=index,
                first_element=first,
                element_count=length,
                aggregator_id=f"aggregator-{index}",
                address=aggregator.address,
            )
            for index, (aggregator, (first, length)) in enumerate(
                zip(aggregators, cuts, strict=True)
            )
        ]

    def assign(
        self,
        nodes: list[tuple[int, int]],
        term: int = 1,
        placement: int = 1,
        evaluation: list[tuple[int, int]] | None = None,
    ) -> coordination.AssignJob:
        """The assignment of these (first, span) nodes."""
        return coordination.AssignJob(
            plan=self.plan,
            term=term,
            ranges=self.ranges,
            placement=placement,
            train_nodes=[training_pb2.TreeNode(first=a, span=b) for a, b in nodes],
            evaluation_nodes=[training_pb2.TreeNode(first=a, span=b) for a, b in evaluation or []],
        )

    def go(
        self, version: int, action: int = GoRecord.ACTION_TRAIN, round: int = 0, term: int = 1
    ) -> training_pb2.GoRecord:
        """A go record of the root."""
        return GoRecord(term=term, version=version, round=round, action=action)  # type: ignore[arg-type]

    def version(self, number: int) -> NDArray[np.float32]:
        """Parameters of a version: made up, the same for every caller."""
        random = np.random.default_rng(number)
        values = random.standard_normal(self.plan.layout.element_count)
        return (values * 0.1).astype(np.float32)

    def _parts(self, split: str) -> tuple[Any, ChunkReader]:
        manifest = DatasetManifest.from_json(self.blobs[self.plan.manifest_digest])
        spec = job_spec_pb2.JobSpec.FromString(self.plan.spec)
        model = build_model(spec, DataSchema(manifest.features, len(manifest.classes)))

        def fetch(digest: str) -> Path:
            path = self.folder / f"reference-{digest}"
            path.write_bytes(self.blobs[digest])
            return path

        return model, ChunkReader(manifest, split, fetch, dtype=np.float32)

    @one_blas_thread()
    def gradient(
        self,
        node: Node,
        version: int,
        absent: set[int] = frozenset(),  # type: ignore[assignment]
    ) -> tuple[NDArray[np.float32] | None, int]:
        """What the worker must send for a node, computed here leaf by leaf."""
        model, reader = self._parts("train")
        payloads: dict[int, NDArray[Any] | None] = {}
        count = 0
        for shard in range(node.first, min(node.first + node.span, self.plan.shards)):
            out = np.zeros(self.plan.layout.element_count, np.float32)
            if shard in absent:
                continue
            outcome = run_leaf(model, self.version(version), reader, self.plan, shard, version, out)
            payloads[shard] = out if outcome.count else None
            count += outcome.count
        return reduce_leaves(payloads, self.plan.shards), count

    @one_blas_thread()
    def evaluation(self, version: int) -> NDArray[np.float64] | None:
        """Sums of the whole evaluation."""
        model, reader = self._parts("test")
        payloads: dict[int, NDArray[Any] | None] = {}
        for shard in range(self.plan.evaluation_shards):
            sums = np.zeros(len(self.plan.evaluation_sums))
            run_evaluation_leaf(model, self.version(version), reader, self.plan, shard, sums)
            payloads[shard] = sums
        return reduce_leaves(payloads, self.plan.evaluation_shards)

    async def worker(self, *controls: str, **settings: Any) -> Session:
        """Start a worker."""
        config = WorkerConfig(
            id=settings.pop("id", "worker-1"),
            control=controls,
            storage=(),
            cache_dir=settings.pop("cache_dir", self.folder / "cache"),
            **{"slots": 1, "cache_bytes": 2**30, "labels": (), **_defaults(), **settings},
        )
        session = Session(config, WorkerMetrics(new_registry()), self._download, lambda *_: None)
        self.sessions.append(session)
        await session.start()
        return session

    async def _download(self, digest: str, path: Path) -> None:
        await self.storage_up.wait()
        self.downloads.append(digest)
        if digest not in self.blobs:
            raise NotFound(f"no blob {digest[:12]}")
        path.write_bytes(self.blobs[digest])

    def grid(self) -> list[tuple[int, int]]:
        return frame_grid(self.plan.layout.element_count, 4)

    async def close(self) -> None:
        for session in self.sessions:
            await session.close()


def _defaults() -> dict[str, Any]:
    return {"slot_memory_bytes": 0, "leaf_timeout_s": 60.0, "drain_timeout_s": 30.0}


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    await bench.close()


@pytest.fixture
def eventually() -> Callable[[Callable[[], bool]], Any]:
    """Wait for a condition that no event tells; the deadline is a guard only."""

    async def wait(condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not condition():
                await asyncio.sleep(0.01)

    return wait
