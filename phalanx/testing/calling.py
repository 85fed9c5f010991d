"""A client of a cluster that calls all the time, and keeps every call that failed.

    with Callers(cluster, job.id, small_job) as callers:
        ...  # disturb the cluster
        callers.next_round()
        results = callers.finish()
    assert callers.failures == []

Nothing is retried here: what a call does about a server that is away is the interface's own affair.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

from phalanx.errors import PhalanxError
from phalanx.sdk.cluster import Cluster
from phalanx.sdk.job import Job
from phalanx.sdk.values import Result

GUARD_S = 90.0
PAUSE_S = 0.1


class Callers:
    """One thread for each kind of call; `job_id` runs, `small` is submitted in every round."""

    def __init__(self, cluster: Cluster, job_id: str, small: Mapping[str, Any]) -> None:
        self.failures: list[str] = []
        self.calls: Counter[str] = Counter()
        self._cluster, self._job_id, self._small = cluster, job_id, small
        self._submitted: list[Job] = []
        self._round = threading.Semaphore(1)
        self._ended = threading.Event()
        repeated: dict[str, Callable[[], object]] = {
            "get": lambda: cluster.get(job_id),
            "list jobs": cluster.jobs,
            "list workers": cluster.workers,
            "list data": cluster.data.list,
            "get data": lambda: cluster.data.manifest("blobs"),
            "list models": cluster.models.list,
            "list events": lambda: list(cluster.events(job_id)),
            "metrics": lambda: cluster.get(job_id).metrics(["loss"]),
            "plan": lambda: cluster.plan(small),
        }
        self._threads = [
            threading.Thread(target=self._repeat, args=each, name=each[0])
            for each in repeated.items()
        ]
        self._threads.append(threading.Thread(target=self._watch, name="watch"))
        self._threads.append(threading.Thread(target=self._submit, name="submit"))

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def next_round(self) -> None:
        """Submit one more job."""
        self._round.release()

    def finish(self) -> list[Result]:
        """Call no more; return what became of the jobs that were submitted."""
        self._end()
        return [job.wait(timeout_s=GUARD_S) for job in self._submitted]

    def _end(self) -> None:
        self._ended.set()
        self._round.release()
        for thread in self._threads:
            thread.join(GUARD_S)

    def _made(self, name: str, call: Callable[[], object]) -> None:
        try:
            call()
        except PhalanxError as error:
            self.failures.append(f"{name}: {error.code} {error.reason}: {error}")
        self.calls[name] += 1

    def _repeat(self, name: str, call: Callable[[], object]) -> None:
        while not self._ended.wait(PAUSE_S):
            self._made(name, call)

    def _submit(self) -> None:
        while self._round.acquire() and not self._ended.is_set():
            self._made("submit", lambda: self._submitted.append(self._cluster.submit(self._small)))

    def _watch(self) -> None:
        """Follow the job to its end; each update counts as a call."""

        def follow() -> None:
            for _ in self._cluster.get(self._job_id).watch():
                self.calls["watch"] += 1
                if self._ended.is_set():
                    return

        self._made("watch", follow)
