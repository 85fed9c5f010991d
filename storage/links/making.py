"""Chunks made from whichever data set, and place in its files, still gives them."""

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from phalanx.data.link_plans import ChunkPlace
from phalanx.data.manifest import DatasetManifest
from phalanx.errors import DataLoss, FailedPrecondition, PhalanxError, Unavailable
from phalanx.v1 import dataset_service_pb2 as dataset_pb
from storage.core.catalog import VersionName
from storage.links.maker import Makers, is_transient
from storage.links.manifests import (
    LinkedManifest,
    ManifestCache,
    demand_allowed,
    demand_sizes,
    parsed,
)
from storage.links.ranking import Ranking
from storage.links.slots import Slots
from storage.service.operations import LINKED_DATA_LOST

_FILES_AT_ONCE = 100
"""Are looked at before a reader serves others again; each time it has its whole time limit."""

ResultT = TypeVar("ResultT")

_CHECKS = "being added"
"""Takes the turns of all data sets that are being registered."""


@dataclass(frozen=True)
class _Problem:
    """Why a data set did not give a chunk; ``place`` is None where that was not known."""

    dataset: dataset_pb.Dataset
    place: ChunkPlace | None
    error: PhalanxError


class Making:
    """Use it in one event loop. ``makers`` do the work, in threads of ``pool``, at which data sets
    have turns by ``slots``; ``load`` reads a registered manifest, in one of them too."""

    def __init__(
        self,
        roots: Sequence[str],
        makers: Makers,
        pool: Executor,
        slots: Slots,
        load: Callable[[str], DatasetManifest],
    ) -> None:
        self._roots = tuple(roots)
        self.makers = makers
        self._pool = pool
        self._slots = slots
        self._manifests = ManifestCache(lambda digest: parsed(load(digest), self._roots))
        self._ranking = Ranking()

    async def make(self, digest: str, datasets: Sequence[dataset_pb.Dataset]) -> bytes:
        """Return a chunk that these data sets link, newest first.

        Raises DataLoss (LINKED_DATA_LOST) where none gives it any more, Unavailable where one may.
        """
        problems: list[_Problem] = []
        for dataset in self._ranking.sources(digest, datasets):
            content = await self._from_dataset(digest, dataset, problems)
            if content is not None:
                return content
            self._ranking.failed(digest, dataset.manifest_digest)
        problem = _worst(problems, datasets)
        raise _explained(digest, problem) from problem.error

    async def check(self, manifest: DatasetManifest) -> None:
        """Look whether the chunks of a manifest can be made: the first of each split is.

        Raises FailedPrecondition naming a file that cannot be read, InvalidArgument, Unavailable.
        """
        linked = await self._run(_CHECKS, lambda: self._allowed(manifest))
        assert manifest.links is not None
        for first in range(0, len(manifest.links.all_files()), _FILES_AT_ONCE):
            stop = first + _FILES_AT_ONCE
            await self._run(_CHECKS, partial(self.makers.check, linked.plan, first, stop))
        for chunks in manifest.splits.values():
            digest = chunks[0].digest
            await self._from_place(_CHECKS, digest, linked, linked.places[digest][0])

    async def _from_dataset(
        self, digest: str, dataset: dataset_pb.Dataset, problems: list[_Problem]
    ) -> bytes | None:
        """Return the chunk, or None and what is wrong in ``problems``."""
        place: ChunkPlace | None = None
        source, key = dataset.manifest_digest, f"{dataset.namespace}/{dataset.name}"
        try:
            linked = await self._run(key, lambda: self._manifests.get(source))
            places = self._ranking.places(digest, source, linked.places[digest])
            place = places[0]
            linked.demand_allowed(self._roots)
        except PhalanxError as error:
            problems.append(_Problem(dataset, place, error))
            return None
        for place in places:
            try:
                content = await self._from_place(key, digest, linked, place)
            except PhalanxError as error:
                problems.append(_Problem(dataset, place, error))
                continue
            self._ranking.gave(digest, source, place)
            return content
        return None

    async def _from_place(
        self, key: str, digest: str, linked: LinkedManifest, place: ChunkPlace
    ) -> bytes:
        """Return the chunk. Raises PhalanxError."""

        def make() -> bytes:
            content = self.makers.make(linked.plan, place.split, place.first, place.stop)
            if hashlib.sha256(content).hexdigest() != digest:
                raise FailedPrecondition(
                    f"the rows in {linked.plan.files} are not what they were when it was linked",
                    reason="LINKED_FILE_CHANGED",
                )
            return content

        return await self._run(key, make)

    def _allowed(self, manifest: DatasetManifest) -> LinkedManifest:
        demand_allowed(manifest, self._roots)
        linked = parsed(manifest, self._roots)
        demand_sizes(manifest)
        return linked

    async def _run(self, key: str, function: Callable[[], ResultT]) -> ResultT:
        async with self._slots.of(key):
            return await asyncio.get_running_loop().run_in_executor(self._pool, function)


def _worst(problems: Sequence[_Problem], datasets: Sequence[dataset_pb.Dataset]) -> _Problem:
    """What to tell of: a problem that may pass, else that of the newest data set."""
    order = [dataset.manifest_digest for dataset in datasets]
    return min(
        problems,
        key=lambda each: (not is_transient(each.error), order.index(each.dataset.manifest_digest)),
    )


def _explained(digest: str, problem: _Problem) -> PhalanxError:
    """What to tell whoever asked for a chunk that no data set gives."""
    dataset, place, cause = problem.dataset, problem.place, problem.error
    name = VersionName(dataset.namespace, dataset.name, dataset.version)
    where = ""
    if place is not None:
        where = f" (rows {place.first} to {place.stop - 1} of its {place.split} split's files)"
    text = f"chunk {digest[:12]} of data set {name}{where} cannot be made: {cause.message}"
    if is_transient(cause):
        return Unavailable(text, reason=cause.reason)
    return DataLoss(
        f"{text}. Bring the file back as it was, or add the data set again, then "
        "`phalanx retry` the jobs that failed",
        reason=LINKED_DATA_LOST,
        details={"dataset": str(name), "cause": cause.reason},
    )
