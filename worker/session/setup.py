"""What a job needs before its leaves can run: data manifest, code, start model, shared memory."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from phalanx.data.manifest import DatasetManifest
from phalanx.errors import InvalidArgument
from phalanx.v1 import training_pb2
from worker import ipc
from worker.cache import BlobCache, Pinned
from worker.memory import Arena

_CACHE_SHARE = 0.5
"""A data set up to this share of the cache is taken to stay in it."""

_numbers = itertools.count(1)


@dataclass(eq=False)
class PreparedJob:
    """A job whose files are here. `number` names this hosting in messages to leaf processes."""

    plan: training_pb2.JobPlan
    manifest: Pinned
    code: Path | None
    start_model: Pinned | None
    fits: bool
    arena: Arena
    number: int = field(default_factory=lambda: next(_numbers))

    @property
    def code_key(self) -> str:
        """Names the set of user code; empty: none."""
        return self.code.name if self.code is not None else ""

    def setup_body(self) -> bytes:
        """Body of SETUP."""
        return ipc.pack_json(self._document(), self.plan.SerializeToString())

    def describe_body(self) -> bytes:
        """Body of DESCRIBE."""
        return self.setup_body()

    def release(self) -> None:
        """Let go of files and memory."""
        self.arena.close()
        self.manifest.release()
        if self.start_model is not None:
            self.start_model.release()

    def _document(self) -> dict[str, object]:
        return {
            "job": self.number,
            "manifest": str(self.manifest.path),
            "code": str(self.code) if self.code is not None else "",
            "start_model": str(self.start_model.path) if self.start_model is not None else "",
            "fits": self.fits,
        }


async def prepare(plan: training_pb2.JobPlan, cache: BlobCache, code_root: Path) -> PreparedJob:
    """Fetch everything that `plan` names. Raises PhalanxError where something cannot be had."""
    pinned: list[Pinned] = []
    try:
        manifest = await cache.get(plan.manifest_digest)
        pinned.append(manifest)
        stored = DatasetManifest.from_json(manifest.path.read_bytes())
        code = await _write_code(plan, cache, code_root) if plan.code_digests else None
        start_model = None
        if plan.start_model_digest:
            start_model = await cache.get(plan.start_model_digest)
            pinned.append(start_model)
        dtype = np.dtype(plan.layout.dtype or "float32")
        arena = Arena.create(plan.job_id, plan.layout.element_count, dtype)
    except BaseException:
        for each in pinned:
            each.release()
        raise
    fits = stored.size_bytes <= cache.limit_bytes * _CACHE_SHARE
    return PreparedJob(plan, manifest, code, start_model, fits, arena)


async def _write_code(plan: training_pb2.JobPlan, cache: BlobCache, root: Path) -> Path:
    """Write the job's code into the folder named by its hash; files that are right stay."""
    listing = "\n".join(f"{path} {digest}" for path, digest in sorted(plan.code_digests.items()))
    folder = root / hashlib.sha256(listing.encode()).hexdigest()[:32]
    for name, digest in sorted(plan.code_digests.items()):
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise InvalidArgument(f"code.files: {name!r} is no path inside of the job's code")
        source = await cache.get(digest)
        try:
            _write_if_different(folder / path, source.path.read_bytes())
        finally:
            source.release()
    return folder


def _write_if_different(path: Path, content: bytes) -> None:
    with contextlib.suppress(FileNotFoundError):
        if path.read_bytes() == content:
            return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    partial.replace(path)
