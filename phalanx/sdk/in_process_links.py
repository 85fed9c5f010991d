"""Linked data sets of a cluster without processes."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from phalanx.errors import DataLoss, FailedPrecondition, PhalanxError, Unavailable
from phalanx.files import replace_content

if TYPE_CHECKING:
    from phalanx.data.link_plans import ChunkPlace
    from phalanx.data.linked_chunks import ChunkMaker, OpenFiles
    from phalanx.data.manifest import DatasetManifest

_KEPT_BYTES = 256 * 1024 * 1024
_KEPT_FILES = 64
"""However large they are: who asked for one has not mapped it yet."""
_DECODED_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class _Linked:
    """One manifest, the files that are open for it, and where its chunks lie."""

    maker: ChunkMaker
    files: OpenFiles
    places: dict[str, tuple[ChunkPlace, ...]]


class LinkedBlobs:
    """Makes chunks as files of a folder when they are needed; the oldest go when there are many."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._mutex = threading.Lock()
        #: By the digests of their manifests, the oldest first.
        self._linked: OrderedDict[str, _Linked] = OrderedDict()
        self._kept: OrderedDict[str, int] = OrderedDict()

    def register(self, manifest_digest: str, manifest: DatasetManifest) -> None:
        """Take a linked manifest. Raises FailedPrecondition naming a file that cannot be read."""
        from phalanx.data.link_plans import places_of, plan_of
        from phalanx.data.linked_chunks import ChunkMaker, OpenFiles

        places = places_of(manifest)
        # The files are read by whoever linked them: this very process.
        files = OpenFiles(["/"], _DECODED_BYTES)
        maker = ChunkMaker(plan_of(manifest), files)
        with self._mutex:
            try:
                maker.check()
            except BaseException:
                files.close()
                raise
            self._let_go(manifest_digest)
            self._linked[manifest_digest] = _Linked(maker, files, places)

    def forget(self, manifest_digest: str) -> None:
        """Let go of a manifest that no data set has any more, and of chunks that only it links."""
        with self._mutex:
            self._let_go(manifest_digest)
            for digest in list(self._kept):
                if not any(digest in linked.places for linked in self._linked.values()):
                    self._remove(digest)

    def path(self, digest: str) -> Path | None:
        """Return a file that holds a chunk; None where nobody links it.

        Raises DataLoss where its file is not any more what it was, Unavailable where that may pass.
        """
        with self._mutex:
            # What was linked last is looked at first.
            found = [each for each in reversed(self._linked.values()) if digest in each.places]
            if not found:
                return None
            path = self._folder / digest
            if digest not in self._kept:
                self._folder.mkdir(exist_ok=True)
                content = _first_made(digest, found)
                replace_content(path, content)
                self._kept[digest] = len(content)
                self._trim()
            self._kept.move_to_end(digest)
            return path

    def close(self) -> None:
        """Let the files go."""
        with self._mutex:
            for manifest_digest in list(self._linked):
                self._let_go(manifest_digest)

    def _let_go(self, manifest_digest: str) -> None:
        linked = self._linked.pop(manifest_digest, None)
        if linked is not None:
            linked.files.close()

    def _trim(self) -> None:
        while len(self._kept) > _KEPT_FILES and sum(self._kept.values()) > _KEPT_BYTES:
            self._remove(next(iter(self._kept)))

    def _remove(self, digest: str) -> None:
        del self._kept[digest]
        (self._folder / digest).unlink(missing_ok=True)


def _first_made(digest: str, found: list[_Linked]) -> bytes:
    problem: PhalanxError | None = None
    for linked, place in ((each, place) for each in found for place in each.places[digest]):
        try:
            content = linked.maker.make(place)
        except PhalanxError as error:
            # One that may pass is what to tell of: the next try may succeed.
            problem = error if isinstance(error, Unavailable) else problem or error
            continue
        if hashlib.sha256(content).hexdigest() == digest:
            return content
        problem = problem or FailedPrecondition(
            "the rows of its files are not what they were when they were linked"
        )
    assert problem is not None
    if isinstance(problem, Unavailable):
        raise problem
    raise DataLoss(
        f"chunk {digest[:12]} of a linked data set cannot be made: {problem.message}. Bring the "
        "file back as it was, or add the data set again",
        reason="LINKED_DATA_LOST",
    ) from problem
