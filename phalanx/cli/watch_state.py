"""What a watcher of a job knows: pure, fed with what WatchJob sends and with the time."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from phalanx.sdk.values import Event, event_value, state_name
from phalanx.tasks import runs_tasks
from phalanx.v1 import job_pb2, job_service_pb2

MOVED_S = 2.5
"""How long a shard that changed its worker is shown as moved."""
EVENTS_KEPT = 8
ROUTINE = "CHECKPOINT_COMMITTED"
LOSSES_KEPT = 2000


@dataclass
class WorkerRow:
    """One worker as seen by the watcher: ``note`` says why it has no shards (lost, draining,
    left)."""

    worker_id: str
    shards: frozenset[int] = frozenset()
    examples_per_second: float = 0.0
    note: str = ""


@dataclass
class WatchState:
    """Everything that the display shows."""

    job: job_pb2.Job
    progress: job_pb2.Progress = field(default_factory=job_pb2.Progress)
    workers: dict[str, WorkerRow] = field(default_factory=dict)
    events: deque[Event] = field(default_factory=lambda: deque(maxlen=EVENTS_KEPT))
    losses: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=LOSSES_KEPT))
    _owner: dict[int, str] = field(default_factory=dict)
    _moved_at_s: dict[int, float] = field(default_factory=dict)

    @property
    def state(self) -> str:
        """The job's state (RUNNING)."""
        return state_name(self.job.state)

    @property
    def is_task_set(self) -> bool:
        """Whether the job is a set of independent tasks, which has no steps and no shards."""
        return runs_tasks(self.job.spec)

    @property
    def shard_count(self) -> int:
        """Shards of the job."""
        return max(self.job.spec.data.shards, 1 + max(self._owner, default=0))

    def feed(self, item: job_service_pb2.WatchJobResponse, now_s: float) -> None:
        """Take in one message."""
        kind = item.WhichOneof("update")
        if kind == "job":
            self.job = item.job
            if item.job.HasField("progress"):
                self._take_progress(item.job.progress, now_s)
        elif kind == "event":
            self._take_event(event_value(item.event))
        elif kind == "progress":
            self._take_progress(item.progress, now_s)

    def moved(self, shard: int, now_s: float) -> bool:
        """Return whether a shard changed its worker a moment ago."""
        moved_at_s = self._moved_at_s.get(shard)
        return moved_at_s is not None and now_s - moved_at_s < MOVED_S

    def _take_progress(self, progress: job_pb2.Progress, now_s: float) -> None:
        self.progress = progress
        loss = progress.metrics.get("train/loss")
        if loss is not None and (not self.losses or self.losses[-1][0] != progress.step):
            self.losses.append((progress.step, loss))
        seen = set()
        for worker in progress.workers:
            seen.add(worker.worker_id)
            row = self.workers.setdefault(worker.worker_id, WorkerRow(worker.worker_id))
            row.shards = shards_of(worker.shards)
            row.examples_per_second = worker.examples_per_second
            row.note = "" if row.shards else row.note
            for shard in row.shards:
                before = self._owner.get(shard)
                if before is not None and before != worker.worker_id:
                    self._moved_at_s[shard] = now_s
                self._owner[shard] = worker.worker_id
        for worker_id in self.workers.keys() - seen:
            self.workers[worker_id].shards = frozenset()
            self.workers[worker_id].examples_per_second = 0.0

    def _take_event(self, event: Event) -> None:
        if event.type == ROUTINE:
            # Only the newest of these: several a second would push out what happened to a worker.
            others = [each for each in self.events if each.type != ROUTINE]
            self.events = deque(others, maxlen=EVENTS_KEPT)
        self.events.append(event)
        notes = {
            "WORKER_LOST": "lost",
            "WORKER_LEFT": "left",
            "WORKER_DRAINING": "draining",
            "WORKER_SUSPECTED": "suspected",
            "WORKER_INELIGIBLE": "not eligible",
            "WORKER_QUARANTINED": "quarantined",
            "WORKER_JOINED": "joined",
        }
        if event.worker_id and event.type in notes:
            row = self.workers.setdefault(event.worker_id, WorkerRow(event.worker_id))
            row.note = notes[event.type]
            if event.type in ("WORKER_LOST", "WORKER_LEFT"):
                row.shards = frozenset()
                row.examples_per_second = 0.0


def shards_of(ranges: object) -> frozenset[int]:
    """Return the shard numbers of wire ranges."""
    return frozenset(
        shard
        for item in ranges  # type: ignore[attr-defined]
        for shard in range(item.first, item.first + item.count)
    )


def ranges_text(shards: frozenset[int]) -> str:
    """Return ``0-3 8`` for {0, 1, 2, 3, 8}."""
    parts: list[str] = []
    ordered = sorted(shards)
    start = 0
    for index, shard in enumerate(ordered):
        if index + 1 == len(ordered) or ordered[index + 1] != shard + 1:
            first = ordered[start]
            parts.append(str(first) if first == shard else f"{first}-{shard}")
            start = index + 1
    return " ".join(parts)
