"""Acts that wait together share one transaction, hence one commit that has to be durable.

All acts run on one thread, one after another. Nobody hears the outcome of his act, not even its
error, before the transaction is durable: an error may rest on what another act of the same
transaction did.
"""

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from phalanx.errors import DeadlineExceeded, PhalanxError, ResourceExhausted, Unavailable
from storage.backends.sql.connection import Act, ResultT

_GROUP_ACTS = 128
_QUEUE_ACTS = 1024
WRITE_TIMEOUT_S = 60.0


@dataclass
class Job:
    """One act on its way through the writing thread."""

    act: Act[Any]
    alone: bool = False
    future: Future[Any] = field(default_factory=Future)
    result: Any = None
    error: Exception | None = None

    def finish(self) -> None:
        """Tell whoever waits for it."""
        if self.error is not None:
            self.future.set_exception(self.error)
        else:
            self.future.set_result(self.result)


class WritingThread:
    """Hands groups of jobs to ``commit``, which runs them in one transaction.

    ``commit`` returns why none of them happened, or None after it has set the result or the error
    of each. A group that failed for want of space is tried one by one, so that a large act does not
    take small ones down with it. ``medium`` is what messages call that which is written to.
    """

    def __init__(
        self, name: str, medium: str, commit: Callable[[Sequence[Job]], PhalanxError | None]
    ) -> None:
        self._medium = medium
        self._commit = commit
        self.queue: queue.Queue[Job | None] = queue.Queue(_QUEUE_ACTS)
        self._closing = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def is_current(self) -> bool:
        """Whether the caller is inside an act."""
        return threading.current_thread() is self._thread

    @property
    def is_closed(self) -> bool:
        """Whether no more acts are taken."""
        return self._closed

    def run(self, act: Act[ResultT], *, alone: bool) -> ResultT:
        """Run an act in a transaction; return its result once that is durable."""
        job = Job(act, alone)
        with self._closing:
            if self._closed:
                raise Unavailable("storage is stopping; try again", reason="STOPPING")
            try:
                self.queue.put_nowait(job)
            except queue.Full:
                raise Unavailable(
                    f"{_QUEUE_ACTS} writes are waiting for the {self._medium}; try again",
                    reason="OVERLOADED",
                ) from None
        try:
            result: ResultT = job.future.result(timeout=WRITE_TIMEOUT_S)
        except TimeoutError:
            raise DeadlineExceeded(
                f"the {self._medium} took over {WRITE_TIMEOUT_S:g} s; the write may have happened "
                "or not",
                reason=f"{self._medium.upper()}_SLOW",
            ) from None
        return result

    def close(self) -> bool:
        """Finish what is queued and end; return False if that was done before."""
        with self._closing:
            if self._closed:
                return False
            self._closed = True
            self.queue.put(None)
        self._thread.join()
        return True

    def _run(self) -> None:
        while (first := self.queue.get()) is not None:
            jobs = [first]
            stopping = False
            while len(jobs) < _GROUP_ACTS and not stopping and not jobs[-1].alone:
                try:
                    following = self.queue.get_nowait()
                except queue.Empty:
                    break
                if following is None:
                    stopping = True
                elif following.alone:
                    self._commit_all(jobs)
                    jobs = [following]
                else:
                    jobs.append(following)
            self._commit_all(jobs)
            if stopping:
                break

    def _commit_all(self, jobs: list[Job]) -> None:
        error = self._commit(jobs)
        if isinstance(error, ResourceExhausted) and len(jobs) > 1:
            for job in jobs:
                self._commit_all([job])
            return
        for job in jobs:
            if error is not None:
                job.result, job.error = None, error
            job.finish()
