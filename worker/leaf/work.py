"""One job inside a leaf process: its model, its data, its shared buffers, its leaves."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phalanx.compressors import Codec, Key, build_up_codec, compress_in_place
from phalanx.data.manifest import ChunkInfo, DatasetManifest
from phalanx.data.reader import ChunkReader
from phalanx.models import Batch, Model, build_model
from phalanx.reduction import Node
from phalanx.specs.shard_rows import rows_of_shard
from phalanx.training.leaf import (
    LeafOutcome,
    LocalSteps,
    leaf_chunks,
    row_clip_norm,
    run_batch,
    run_evaluation_leaf,
    training_rows,
)
from phalanx.training.sampler import chunks_in_order, window_rows
from phalanx.training.schema import job_schema
from phalanx.training.shard_readers import ShardReaders
from phalanx.training.start import check_start_parameters, load_start_parameters
from phalanx.training.two_rounds import step_of
from phalanx.v1 import job_spec_pb2, training_pb2
from worker.leaf.read_ahead import ReadAhead
from worker.leaf.reduce import Scratch
from worker.leaf.states import NodeState
from worker.memory import Arena

Array = NDArray[Any]
Fetch = Callable[[ChunkInfo], Path]


class NotMapped(Exception):
    """A chunk would have to be fetched."""


@dataclass(frozen=True)
class Paths:
    """Files that the session process has fetched for a job; None where the job has none."""

    manifest: Path
    code: Path | None = None
    start_model: Path | None = None


@dataclass(frozen=True)
class Described:
    """What only the job's own code can tell."""

    layout: training_pb2.Layout
    evaluation_sums: tuple[str, ...]
    leaf_sha256: str


class JobWork:
    """Everything of one job in one leaf process; built when it is first needed.

    `fits`: the whole data set fits into the disk cache, so chunks are named to the session once.
    """

    def __init__(
        self,
        plan: training_pb2.JobPlan,
        paths: Paths,
        fetch: Fetch,
        arena: Arena | None = None,
        fits: bool = True,
    ) -> None:
        self.plan = plan
        self.spec = job_spec_pb2.JobSpec.FromString(plan.spec)
        self.arena = arena
        self._paths = paths
        self._fetch = fetch
        self._hints = _Hints(fits)
        self._may_fetch = True

    @cached_property
    def manifest(self) -> DatasetManifest:
        """The data set."""
        return DatasetManifest.from_json(self._paths.manifest.read_bytes())

    @cached_property
    def model(self) -> Model:
        """The model; this is where user code is loaded."""
        schema = job_schema(self.plan, self.spec, self.manifest)
        return build_model(self.spec, schema, self._paths.code)

    @cached_property
    def device(self) -> str:
        """What the model's library makes of the GPU of this slot, as a hash; empty: it has none."""
        if not self.spec.resources.gpus:
            return ""
        return str(getattr(self.model, "numeric_fingerprint", ""))

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        """Type of parameters and payloads."""
        return np.dtype(self.model.layout.dtype)

    @cached_property
    def up_codec(self) -> Codec | None:
        """What contributions are encoded with."""
        return build_up_codec(self.spec)

    @cached_property
    def local(self) -> LocalSteps | None:
        """The leaves' own steps; None: they contribute gradients."""
        return LocalSteps(self.plan, self.model.layout) if self.plan.local_steps else None

    @cached_property
    def scratch(self) -> Scratch:
        """Buffers of the reduction."""
        return Scratch(self.plan.layout.element_count, self.dtype)

    @cached_property
    def training_readers(self) -> ShardReaders[ChunkReader]:
        """What reads the rows of each shard."""
        split = self.spec.data.split or "train"
        return ShardReaders(
            self.spec.data, self.manifest, lambda columns: self._reader(split, columns)
        )

    @cached_property
    def training_batches(self) -> ReadAhead:
        """Rows of the training leaves."""
        return ReadAhead(self.training_readers.of, self.plan)

    @cached_property
    def evaluation_reader(self) -> ChunkReader:
        """Rows of the split that evaluations use."""
        return self._reader(self.spec.train.evaluation.split, self.spec.data.features)

    def parameters(self, buffer: int) -> Array:
        """A version in shared memory, read-only for the job's code."""
        assert self.arena is not None
        array = self.arena.array(buffer)[:]
        array.flags.writeable = False
        return array

    def payload(self, buffer: int) -> Array:
        """A payload buffer in shared memory."""
        assert self.arena is not None
        return self.arena.array(buffer)

    def compress(self, buffer: int, first: int, step: int, left_out: Array | None) -> None:
        """Encode the contribution of the node at shard `first`, in its payload buffer.

        What it loses goes to `left_out`, where there is one.
        """
        assert self.arena is not None
        assert self.up_codec is not None
        values, data = self.arena.array(buffer), self.arena.raw(buffer)
        compress_in_place(self.up_codec, values, data, Key(first, step), left_out)

    def state_of(self, node: Node, buffers: tuple[int, ...]) -> NodeState:
        """The state of a node in shared memory."""
        assert self.arena is not None
        return NodeState(self.arena, self.plan, node, buffers, self._inner_names)

    def train(
        self, parameters: Array, shard: int, step: int, out: Array, inner: dict[str, Array]
    ) -> LeafOutcome:
        """Run one training leaf; `inner` is what the shard's own optimizer remembers."""
        batches = self.training_batches
        if self.local is None:
            batch = batches.take(shard, step_of(self.plan, step))
            return run_batch(self.model, parameters, batch, out, row_clip_norm(self.plan))

        def batch_of(own_step: int) -> Batch | None:
            return batches.take(shard, own_step)

        return self.local.run(self.model, parameters, step, batch_of, out, inner)

    def own_steps(self, version: int) -> range:
        """The steps of a shard that make up what is computed at a version."""
        if self.local is not None:
            return self.local.steps_of(version)
        own = step_of(self.plan, version)
        return range(own, own + 1)

    def evaluate(self, parameters: Array, shard: int) -> tuple[LeafOutcome, Array]:
        """Run one evaluation leaf: its sums."""
        sums = np.zeros(len(self.model.evaluation_sums), np.float64)
        reader = self.evaluation_reader
        return run_evaluation_leaf(self.model, parameters, reader, self.plan, shard, sums), sums

    def initialise(self, out: Array) -> None:
        """Write version 0: the start model, or parameters keyed by the seed."""
        if self._paths.start_model is not None:
            load_start_parameters(self._paths.start_model, self.model.layout, out)
        else:
            out[:] = self.model.initial_parameters(self.spec.seed)

    def describe(self) -> Described:
        """Build the model, compare it with the one to start from, and run one leaf on its initial
        parameters."""
        layout = self.model.layout
        if self._paths.start_model is not None:
            check_start_parameters(self._paths.start_model, layout)
        self.plan.layout.CopyFrom(layout)
        parameters = self.model.initial_parameters(self.spec.seed)
        out = np.zeros(layout.element_count, self.dtype)
        inner = {name: np.zeros_like(out) for name in self._inner_names}
        outcome = self.train(parameters, 0, 0, out, inner)
        digest = hashlib.sha256(out.tobytes())
        digest.update(f"{outcome.count} {outcome.loss_sum!r}".encode())
        digest.update(str(getattr(self.model, "numeric_fingerprint", "")).encode())
        return Described(layout, tuple(self.model.evaluation_sums), digest.hexdigest())

    def chunks_to_prefetch(
        self, shards: Iterable[int], step: int
    ) -> tuple[list[ChunkInfo], list[ChunkInfo]]:
        """Chunks of the leaves of this step and the next, and those of a window of rows later,
        that were not named before."""
        plan = self.plan
        incomplete = [shard for shard in shards if not self._hints.complete(shard)]
        if not incomplete:
            return [], []
        # Chunks hold whole rows: they are the same whichever columns a shard sees.
        reader = self.training_readers.of(incomplete[0])

        def chunks_of(steps: Iterable[int]) -> dict[int, None]:
            return {
                index: None
                for each in steps
                for shard in incomplete
                for index in leaf_chunks(plan, reader, shard, each)
            }

        wanted = chunks_of((*self.own_steps(step), *self.own_steps(step + 1)))
        window = window_rows(training_rows(plan, reader, incomplete[0]))
        later_step = self.own_steps(step)[-1] + max(1, window // max(1, plan.rows_per_leaf))
        steps = plan.total_steps * max(1, plan.local_steps)
        later = chunks_of([later_step] if not steps or later_step < steps else [])
        fresh = self._hints.new(wanted)
        fresh_later = self._hints.new_later(later)
        for shard in incomplete:
            all_rows = training_rows(plan, reader, shard)
            self._hints.check(shard, chunks_in_order(all_rows))
        return [reader.chunks[index] for index in fresh], [
            reader.chunks[index] for index in fresh_later if index not in wanted
        ]

    def read_ahead(self, shard: int, step: int) -> bool:
        """Gather the rows of a later leaf; False: no room, or its chunks are not mapped."""
        self._may_fetch = False
        try:
            return self.training_batches.prepare(shard, step)
        except NotMapped:
            return False
        finally:
            self._may_fetch = True

    def forget_rows(self) -> None:
        """Throw out rows that were gathered ahead for shards that have moved away."""
        if "training_batches" in self.__dict__:
            self.training_batches.forget()

    def rows_of(self, shard: int, evaluation: bool) -> tuple[int, int]:
        """First row and number of rows of a shard, for messages."""
        return rows_of_shard(self.plan, shard, evaluation)

    def close(self) -> None:
        """Let go of shared memory and maps."""
        if self.arena is not None:
            self.arena.close()

    @property
    def _inner_names(self) -> tuple[str, ...]:
        return () if self.local is None else self.local.state_names

    def _reader(self, split: str, columns: Collection[str]) -> ChunkReader:
        infos = {chunk.digest: chunk for chunk in self.manifest.splits.get(split, ())}
        dtype = self.spec.train.dtype or "float32"

        def fetch(digest: str) -> Path:
            if not self._may_fetch:
                raise NotMapped
            return self._fetch(infos[digest])

        return ChunkReader(self.manifest, split, fetch, dtype=dtype, columns=columns)


@dataclass
class _Hints:
    """Which chunks were named to the session already, and which shards need no more naming."""

    fits: bool
    named: set[int] = field(default_factory=set)
    named_later: frozenset[int] = frozenset()
    shards: set[int] = field(default_factory=set)

    def complete(self, shard: int) -> bool:
        """Whether all chunks of the shard were named and will stay cached."""
        return shard in self.shards

    def new(self, wanted: Iterable[int]) -> list[int]:
        """Those that the session should fetch; it ignores what it has."""
        if not self.fits:
            return list(wanted)
        fresh = [index for index in wanted if index not in self.named]
        self.named.update(fresh)
        return fresh

    def new_later(self, wanted: Iterable[int]) -> list[int]:
        """Those that were not named for later the last time, nor at all where all will stay."""
        wanted = frozenset(wanted)
        fresh = wanted - self.named_later
        self.named_later = wanted
        return sorted(fresh - self.named if self.fits else fresh)

    def check(self, shard: int, chunks: Iterable[int]) -> None:
        """Note that a shard is complete once all of its chunks were named."""
        if self.fits and self.named.issuperset(chunks):
            self.shards.add(shard)
