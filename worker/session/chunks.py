"""Answers leaf processes that need a chunk of data, and keeps chunks in use pinned."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from phalanx.data.reader import OPEN_BYTES, OPEN_CHUNKS
from phalanx.errors import PhalanxError
from worker import ipc
from worker.cache import BlobCache, Pinned
from worker.core.dispatch import Task
from worker.session.process import LeafProcess

Answer = Callable[[LeafProcess, bytes], None]


class ChunkServer:
    """Chunks stay pinned until the process that mapped them asks for many others, or ends."""

    def __init__(self, cache: BlobCache, answer: Answer) -> None:
        self._cache = cache
        self._answer = answer
        self._pins: dict[LeafProcess, list[tuple[Pinned, int]]] = {}
        self._waiting: dict[asyncio.Task[None], tuple[LeafProcess, Task | None, str]] = {}

    def fetch(self, process: LeafProcess, task: Task | None, document: dict[str, object]) -> None:
        """Get a chunk for a leaf that waits for it; the answer follows."""
        digest = str(document["digest"])
        size_bytes = int(str(document["size_bytes"]))
        work = asyncio.create_task(self._fetch(process, digest, size_bytes))
        self._waiting[work] = process, task, digest
        work.add_done_callback(lambda done: self._waiting.pop(done, None))

    def prefetch(self, document: dict[str, object]) -> None:
        """Start to fetch chunks that will be needed."""
        soon, later = document["soon"], document["later"]
        assert isinstance(soon, list)
        assert isinstance(later, list)
        for digest, size_bytes in soon:
            self._cache.prefetch(digest, size_bytes)
        for digest, size_bytes in later:
            self._cache.prefetch_later(digest, size_bytes)

    def cancel(self, task: Task) -> None:
        """Nobody wants the task any more: a leaf of it that waits for data gives up."""
        for work, (process, waiting, digest) in list(self._waiting.items()):
            # One answer each: the leaf and the count of what it waits for go by answers.
            if waiting is task and self._waiting.pop(work, None) is not None:
                work.cancel()
                body = ipc.pack_json({"digest": digest, "cancelled": True})
                self._answer(process, body)

    def ended(self, task: Task) -> None:
        """The task is through: whatever was still fetched for it is of no use."""
        for work, (_, waiting, _) in list(self._waiting.items()):
            if waiting is task:
                work.cancel()

    def process_gone(self, process: LeafProcess) -> None:
        """Release what the process had mapped."""
        for work, (waiting, _, _) in list(self._waiting.items()):
            if waiting is process:
                work.cancel()
        for pinned, _ in self._pins.pop(process, []):
            pinned.release()

    async def close(self) -> None:
        """Give up everything."""
        for work in list(self._waiting):
            work.cancel()
        await asyncio.gather(*self._waiting, return_exceptions=True)

    async def _fetch(self, process: LeafProcess, digest: str, size_bytes: int) -> None:
        try:
            pinned = await self._cache.get(digest, size_bytes)
        except Exception as error:  # noqa: BLE001 - the leaf waits for an answer, without a limit
            known = isinstance(error, PhalanxError | OSError)
            text = str(error) if known else f"{type(error).__name__}: {error}"
            answer = {"digest": digest, "error": text}
        else:
            self._keep(process, pinned, size_bytes)
            answer = {"digest": digest, "error": "", "path": str(pinned.path)}
        this = asyncio.current_task()
        if this is not None and self._waiting.pop(this, None) is not None:
            self._answer(process, ipc.pack_json(answer))

    def _keep(self, process: LeafProcess, pinned: Pinned, size_bytes: int) -> None:
        """Pin it; the oldest go: a process keeps so many bytes mapped and no more, and half of
        the cache is for what will be needed."""
        self._pins.setdefault(process, []).append((pinned, size_bytes))
        most_bytes = min(OPEN_BYTES, self._cache.limit_bytes // 2 // len(self._pins))
        for pins in self._pins.values():
            total_bytes = sum(size for _, size in pins)
            while len(pins) > 1 and (total_bytes > most_bytes or len(pins) > OPEN_CHUNKS):
                oldest, oldest_bytes = pins.pop(0)
                oldest.release()
                total_bytes -= oldest_bytes
