"""Linked data sets of a cluster without processes."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
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


class LinkedBlobs:
    """Makes chunks as files of a folder when they are needed; the oldest go when there are many."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._mutex = threading.Lock()
        self._makers: dict[str, list[tuple[ChunkMaker, ChunkPlace]]] = {}
        self._kept: OrderedDict[str, int] = OrderedDict()
        self._files: list[OpenFiles] = []

    def register(self, manifest: DatasetManifest) -> None:
        """Take a linked manifest. Raises FailedPrecondition naming a file that cannot be read."""
        from phalanx.data.link_plans import places_of, plan_of
        from phalanx.data.linked_chunks import ChunkMaker, OpenFiles

        # The files are read by whoever linked them: this very process.
        files = OpenFiles(["/"], _DECODED_BYTES)
        maker = ChunkMaker(plan_of(manifest), files)
        with self._mutex:
            self._files.append(files)
            maker.check()
            for digest, places in places_of(manifest).items():
                # What was linked last is looked at first.
                found = self._makers.setdefault(digest, [])
                found[:0] = [(maker, place) for place in places]

    def path(self, digest: str) -> Path | None:
        """Return a file that holds a chunk; None where nobody links it.

        Raises DataLoss where its file is not any more what it was.
        """
        with self._mutex:
            makers = self._makers.get(digest)
            if makers is None:
                return None
            path = self._folder / digest
            if digest not in self._kept:
                self._folder.mkdir(exist_ok=True)
                content = _first_made(digest, makers)
                replace_content(path, content)
                self._kept[digest] = len(content)
                self._trim()
            self._kept.move_to_end(digest)
            return path

    def close(self) -> None:
        """Let the files go."""
        with self._mutex:
            self._makers.clear()
            for files in self._files:
                files.close()

    def _trim(self) -> None:
        while len(self._kept) > _KEPT_FILES and sum(self._kept.values()) > _KEPT_BYTES:
            oldest, _ = self._kept.popitem(last=False)
            (self._folder / oldest).unlink(missing_ok=True)


def _first_made(digest: str, makers: list[tuple[ChunkMaker, ChunkPlace]]) -> bytes:
    problem: PhalanxError | None = None
    for maker, place in makers:
        try:
            content = maker.make(place)
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
