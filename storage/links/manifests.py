"""Linked manifests as storage keeps them: how chunks are made, and where each lies."""

import hashlib
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from phalanx.data.chunk_layout import size_of
from phalanx.data.link_plans import ChunkPlace, places_of, plan_of
from phalanx.data.linked_files import folder_of
from phalanx.data.manifest import DatasetManifest
from phalanx.errors import FailedPrecondition
from phalanx.texts import number_of
from storage.core.keys import invalid
from storage.links.maker import Plan

KEPT_BYTES = 128 * 1024 * 1024
"""Parsed manifests are kept up to this: to parse a large one takes seconds."""

CHUNKS_MAX = 250_000
"""Of one linked data set: what is kept of each has to stay in memory, and in the catalog."""

_PLACE_BYTES = 400
"""What one place takes with its digest: measured, and rounded up."""


@dataclass(frozen=True)
class LinkedManifest:
    """What is needed of a linked manifest; ``outside`` are paths that may not be read, if any."""

    plan: Plan
    places: Mapping[str, tuple[ChunkPlace, ...]]
    outside: tuple[str, ...] = ()

    @property
    def memory_bytes(self) -> int:
        """About what it takes in memory."""
        return sys.getsizeof(self.plan.content) + _PLACE_BYTES * sum(map(len, self.places.values()))

    def demand_allowed(self, roots: Sequence[str]) -> None:
        """Raise FailedPrecondition (LINK_NOT_ALLOWED) where a file lies below none of ``roots``.

        Only what was outside is looked at again: one of them may be a symbolic link that leads
        elsewhere by now, and whoever opens a file looks anyway.
        """
        for path in self.outside[:1]:
            folder_of(path, roots)


def parsed(manifest: DatasetManifest, roots: Sequence[str]) -> LinkedManifest:
    """Return what is needed of a linked manifest; raises InvalidArgument if it is none."""
    try:
        assert manifest.links is not None
        paths = tuple(str(file.path) for file in manifest.links.all_files())
        content = plan_of(manifest).to_json()
        places = places_of(manifest)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise invalid("manifest_digest", f"the links of the manifest are none: {error!r}") from None
    plan = Plan(hashlib.sha256(content).hexdigest(), content, _listed(paths))
    return LinkedManifest(plan, places, tuple(_outside(paths, roots)))


def demand_allowed(manifest: DatasetManifest, roots: Sequence[str]) -> None:
    """Raise FailedPrecondition (LINK_NOT_ALLOWED) unless all files may be read, and InvalidArgument
    where there are too many chunks.

    Before anything else is done with a manifest that somebody brings.
    """
    assert manifest.links is not None
    count = sum(map(len, manifest.splits.values()))
    if count > CHUNKS_MAX:
        raise invalid(
            "manifest.splits",
            f"{number_of(count, 'chunk')}; a linked data set has at most {CHUNKS_MAX:,}: add it "
            "with larger chunks (chunk_bytes), or as several data sets",
        )
    try:
        paths = [str(file.path) for file in manifest.links.all_files()]
    except TypeError as error:
        raise invalid("manifest_digest", f"the links of the manifest are none: {error!r}") from None
    for path in paths:
        folder_of(path, roots)


def demand_sizes(manifest: DatasetManifest) -> None:
    """Raise InvalidArgument where a chunk has another size than its rows take.

    Nobody could tell by the chunks: they are not stored, and only some are made to look at them.
    """
    sizes: dict[tuple[int, int], int] = {}
    for split, chunks in manifest.splits.items():
        for index, chunk in enumerate(chunks):
            key = chunk.rows, chunk.nonzeros
            try:
                wanted = sizes.get(key) or sizes.setdefault(key, size_of(chunk, manifest))
            except (KeyError, TypeError) as error:
                raise invalid("manifest.dtype", f"no chunk has it: {error!r}") from None
            if chunk.size_bytes != wanted:
                raise invalid(
                    f"manifest.splits.{split}[{index}].size_bytes",
                    f"{chunk.size_bytes}, but by its rows it has {wanted} bytes",
                )


class ManifestCache:
    """Parsed manifests by digest, the least recently used of which go; threads may share it.

    ``load`` reads and parses one; it is called once however many ask at the same time.
    """

    def __init__(
        self, load: Callable[[str], LinkedManifest], limit_bytes: int = KEPT_BYTES
    ) -> None:
        self._load = load
        self._limit_bytes = limit_bytes
        self._mutex = threading.Lock()
        self._kept: OrderedDict[str, LinkedManifest] = OrderedDict()
        self._kept_bytes = 0
        self._loading: dict[str, threading.Lock] = {}

    def get(self, digest: str) -> LinkedManifest:
        """Return a manifest that was registered. Raises what ``load`` raises."""
        with self._mutex:
            found = self._found(digest)
            if found is not None:
                return found
            loading = self._loading.setdefault(digest, threading.Lock())
        with loading:
            with self._mutex:
                found = self._found(digest)
            if found is not None:
                return found
            try:
                found = self._load(digest)
            finally:
                with self._mutex:
                    self._loading.pop(digest, None)
                    if found is not None:
                        self._keep(digest, found)
            return found

    def _found(self, digest: str) -> LinkedManifest | None:
        found = self._kept.get(digest)
        if found is not None:
            self._kept.move_to_end(digest)
        return found

    def _keep(self, digest: str, manifest: LinkedManifest) -> None:
        if digest in self._kept or manifest.memory_bytes > self._limit_bytes:
            return
        self._kept[digest] = manifest
        self._kept_bytes += manifest.memory_bytes
        while self._kept_bytes > self._limit_bytes:
            _, oldest = self._kept.popitem(last=False)
            self._kept_bytes -= oldest.memory_bytes


def _outside(paths: Sequence[str], roots: Sequence[str]) -> Sequence[str]:
    found = []
    for path in paths:
        try:
            folder_of(path, roots)
        except FailedPrecondition:
            found.append(path)
    return found


def _listed(paths: Sequence[str]) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if paths[3:] else "")
