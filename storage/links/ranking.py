"""Where a chunk is tried to be made first: where it was had before, and last where it failed."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import TypeVar

from phalanx.data.link_plans import ChunkPlace
from phalanx.v1 import dataset_service_pb2 as dataset_pb

_CHUNKS = 10_000
_SOURCES = 1_000

KeyT = TypeVar("KeyT")
ValueT = TypeVar("ValueT")


class Ranking:
    """What is remembered of the manifests and places that gave chunks, and of those that did not.

    It is only an order, in which nothing is left out: whatever was forgotten, or is outdated, costs
    one more attempt.
    """

    def __init__(self, chunks: int = _CHUNKS, sources: int = _SOURCES) -> None:
        self._chunks = chunks
        self._sources = sources
        self._gave: OrderedDict[str, tuple[str, ChunkPlace]] = OrderedDict()
        self._failed: OrderedDict[str, None] = OrderedDict()

    def sources(
        self, digest: str, datasets: Sequence[dataset_pb.Dataset]
    ) -> list[dataset_pb.Dataset]:
        """Return the data sets that link a chunk, best first, of each manifest one.

        First is that which gave it last, then come those whose last attempt did not fail; equals
        stay in order.
        """
        best = self._gave[digest][0] if digest in self._gave else ""
        once: dict[str, dataset_pb.Dataset] = {}
        for dataset in datasets:
            once.setdefault(dataset.manifest_digest, dataset)
        return sorted(
            once.values(),
            key=lambda each: (each.manifest_digest != best, each.manifest_digest in self._failed),
        )

    def places(
        self, digest: str, manifest_digest: str, places: Sequence[ChunkPlace]
    ) -> list[ChunkPlace]:
        """Return the places of a chunk in one manifest, best first."""
        gave = self._gave.get(digest)
        return sorted(places, key=lambda place: gave != (manifest_digest, place))

    def gave(self, digest: str, manifest_digest: str, place: ChunkPlace) -> None:
        """The chunk was made from there."""
        self._failed.pop(manifest_digest, None)
        _remember(self._gave, digest, (manifest_digest, place), self._chunks)

    def failed(self, digest: str, manifest_digest: str) -> None:
        """No place of this manifest gave the chunk."""
        if self._gave.get(digest, ("",))[0] == manifest_digest:
            del self._gave[digest]
        _remember(self._failed, manifest_digest, None, self._sources)


def _remember(memory: OrderedDict[KeyT, ValueT], key: KeyT, value: ValueT, limit: int) -> None:
    memory[key] = value
    memory.move_to_end(key)
    while len(memory) > limit:
        memory.popitem(last=False)
