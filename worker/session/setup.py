"""What a job needs before its leaves can run: data manifest, code, start model, shared memory."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from phalanx.data.manifest import DatasetManifest
from phalanx.tasks import runs_tasks
from phalanx.v1 import training_pb2
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.wheels import wheel_path
from worker import ipc
from worker.cache import BlobCache, Pinned
from worker.code import CodeFolder, folder_name, open_folder
from worker.memory import Arena

_CACHE_SHARE = 0.5
"""A data set up to this share of the cache is taken to stay in it."""

_numbers = itertools.count(1)


@dataclass(eq=False)
class PreparedJob:
    """A job whose files are here. `number` names this hosting in messages to leaf processes."""

    plan: training_pb2.JobPlan
    manifest: Pinned | None
    code: CodeFolder | None
    start_model: Pinned | None
    fits: bool
    arena: Arena
    model_files: dict[str, Pinned] = field(default_factory=dict)
    """Of the stored model that a program takes."""
    timeout_s: float = 0.0
    """After which a call is killed; 0: the worker's own limit of leaves."""
    number: int = field(default_factory=lambda: next(_numbers))

    @property
    def code_key(self) -> str:
        """Names the set of user code; empty: none."""
        return self.code.path.name if self.code is not None else ""

    def setup_body(self) -> bytes:
        """Body of SETUP."""
        return ipc.pack_json(self._document(), self.plan.SerializeToString())

    def describe_body(self) -> bytes:
        """Body of DESCRIBE."""
        return self.setup_body()

    def release(self) -> None:
        """Let go of files and memory."""
        self.arena.close()
        if self.manifest is not None:
            self.manifest.release()
        if self.code is not None:
            self.code.release()
        if self.start_model is not None:
            self.start_model.release()
        for file in self.model_files.values():
            file.release()

    def _document(self) -> dict[str, object]:
        return {
            "job": self.number,
            "manifest": str(self.manifest.path) if self.manifest is not None else "",
            "code": str(self.code.path) if self.code is not None else "",
            "start_model": str(self.start_model.path) if self.start_model is not None else "",
            "model_files": {name: str(file.path) for name, file in self.model_files.items()},
            "fits": self.fits,
        }


async def prepare(plan: training_pb2.JobPlan, cache: BlobCache, code_root: Path) -> PreparedJob:
    """Fetch everything that `plan` names. Raises PhalanxError where something cannot be had."""
    pinned: list[Pinned | CodeFolder] = []
    try:
        manifest, fits = None, True
        if plan.manifest_digest:
            manifest = await cache.get(plan.manifest_digest)
            pinned.append(manifest)
            stored = DatasetManifest.from_json(manifest.path.read_bytes())
            fits = stored.size_bytes <= cache.limit_bytes * _CACHE_SHARE
        code = None
        if plan.code_digests:
            code = open_folder(code_root, folder_name(plan.code_digests))
            pinned.append(code)
            await _fill(code, plan, cache)
        start_model = None
        if plan.start_model_digest:
            start_model = await cache.get(plan.start_model_digest)
            pinned.append(start_model)
        model_files: dict[str, Pinned] = {}
        for name, digest in plan.model_files.items():
            model_files[name] = await cache.get(digest)
            pinned.append(model_files[name])
        dtype = np.dtype(plan.layout.dtype or "float32")
        # Tasks share no memory: what they return comes in messages.
        shares = not runs_tasks(JobSpec.FromString(plan.spec))
        elements = plan.layout.element_count if shares else 0
        arena = Arena.create(plan.job_id, elements, dtype)
    except BaseException:
        for each in pinned:
            each.release()
        raise
    return PreparedJob(plan, manifest, code, start_model, fits, arena, model_files)


async def _fill(folder: CodeFolder, plan: training_pb2.JobPlan, cache: BlobCache) -> None:
    """Write the job's source files and the files of its wheels; those that are right stay."""
    files: dict[str, bytes] = {}
    wheels: dict[str, Path] = {}
    pinned: list[Pinned] = []
    try:
        for name, digest in sorted(plan.code_digests.items()):
            blob = await cache.get(digest)
            pinned.append(blob)
            if name == wheel_path(digest):
                wheels[f"wheel {digest[:12]}"] = blob.path
            else:
                files[name] = blob.path.read_bytes()
        await asyncio.to_thread(folder.fill, files, wheels)
    finally:
        for blob in pinned:
            blob.release()
