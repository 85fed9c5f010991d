"""How much of the cores' arithmetic reaches the model: one worker, two workers, checkpoints."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.clusters import FASHION, cluster, fashion_job, median, step_seconds
from bench.cores import two_workers_bound
from bench.results import Measurement
from phalanx.blas import ENVIRONMENT
from phalanx.data.ingest import ingest
from phalanx.data.options import IngestOptions
from phalanx.sdk.job import Job

STEPS = 120
WARM_UP = 20
ROUNDS = 9
CHECKPOINT_PAIRS = 8
BATCH = 4096


@dataclass(frozen=True)
class Round:
    """Examples per second of the four, measured within half a minute."""

    loop: float
    one_worker: float
    two_workers: float
    two_loops: float

    @property
    def efficiency(self) -> float:
        """One worker ÷ one plain loop."""
        return self.one_worker / self.loop

    @property
    def gain(self) -> float:
        """Two workers ÷ one."""
        return self.two_workers / self.one_worker

    @property
    def ideal(self) -> float:
        """Two independent loops ÷ one."""
        return self.two_loops / self.loop


def run(command: str) -> list[Measurement]:
    """`worker_efficiency_1`, `scaling_2_workers` and its bound, `checkpoint_overhead`.

    The first two are medians of the ratios of single rounds: the machine changes its speed by more
    within minutes than what is looked for.
    """
    with tempfile.TemporaryDirectory() as folder:
        loop = NumpyLoop(Path(folder))
        rounds = [_round(loop, backwards=bool(number % 2)) for number in range(ROUNDS)]
    efficiency = median([each.efficiency for each in rounds])
    scaling = median([each.gain / each.ideal for each in rounds])
    plain, alone = median([each.loop for each in rounds]), median([r.one_worker for r in rounds])
    gain, ideal = median([each.gain for each in rounds]), median([each.ideal for each in rounds])
    overhead = _checkpoint_overhead()
    return [
        Measurement(
            "worker_efficiency_1",
            alone,
            "rows/s",
            plain,
            efficiency,
            ">= 0.90",
            efficiency >= 0.9,
            command,
        ),
        Measurement(
            "scaling_2_workers",
            gain,
            "ratio",
            ideal,
            scaling,
            ">= 0.9",
            scaling >= 0.9,
            command,
        ),
        two_workers_bound(_steps_per_s(alone), ideal, command),
        Measurement(
            "checkpoint_overhead",
            overhead,
            "ratio",
            None,
            overhead,
            "<= 0.05",
            overhead <= 0.05,
            command,
        ),
    ]


def _round(loop: NumpyLoop, *, backwards: bool) -> Round:
    measures: dict[str, Callable[[], float]] = {
        "loop": lambda: loop.examples_per_s(1),
        "one_worker": lambda: _examples_per_s(1),
        "two_workers": lambda: _examples_per_s(2),
        "two_loops": lambda: loop.examples_per_s(2),
    }
    names = reversed(measures) if backwards else iter(measures)
    return Round(**{name: measures[name]() for name in names})


def _examples_per_s(workers: int) -> float:
    with cluster(workers=workers) as running:
        running.data.add("fashion", str(FASHION))
        job = running.submit(fashion_job("efficiency", STEPS))
        seconds = _seconds_per_step(job)
        return _rows_per_step(job.message.spec.data.shards) / seconds


def _checkpoint_overhead() -> float:
    """Time of a step with checkpoints ÷ without, minus 1: the median of pairs of jobs.

    All in one cluster, the first of a pair now without, now with: two clusters differ by more than
    what is looked for, and so do two minutes.
    """
    ratios = []
    with cluster(workers=1) as running:
        running.data.add("fashion", str(FASHION))
        for pair in range(CHECKPOINT_PAIRS):
            seconds = {}
            for every in (0, 10) if pair % 2 else (10, 0):
                job = running.submit(fashion_job(f"checkpoints-{pair}-{every}", STEPS, every))
                seconds[every] = _seconds_per_step(job)
            ratios.append(seconds[10] / seconds[0])
    return median(ratios) - 1


def _seconds_per_step(job: Job) -> float:
    result = job.wait(timeout_s=300)
    assert result.steps == STEPS
    return statistics.fmean(step_seconds(job, WARM_UP))


def _steps_per_s(rows_per_s: float) -> float:
    return rows_per_s / _rows_per_step(fashion_job("efficiency", STEPS)["data"]["shards"])


def _rows_per_step(shards: int) -> float:
    """Mean rows of a step over an epoch of the 10,000 training rows."""
    rows_per_leaf = BATCH // shards
    largest = -(-10_000 // shards)
    return 10_000 / -(-largest // rows_per_leaf)


class NumpyLoop:
    """The plain loop over the same leaves, in processes of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        blobs = folder / "blobs"
        blobs.mkdir()
        manifest = ingest([FASHION], IngestOptions(), _Folder(blobs))
        (folder / "manifest.json").write_bytes(manifest.to_json())

    def examples_per_s(self, processes: int) -> float:
        """Sum over so many loops at once."""
        command = [sys.executable, "-m", "bench.numpy_loop", str(self._folder / "blobs")]
        command += [str(self._folder / "manifest.json"), str(STEPS)]
        running = [
            subprocess.Popen(
                command, stdout=subprocess.PIPE, text=True, env={**os.environ, **ENVIRONMENT}
            )
            for _ in range(processes)
        ]
        total = 0.0
        for process in running:
            output, _ = process.communicate(timeout=300)
            total += float(output)
        return total


class _Folder:
    """A blob sink that is a folder of files named by digest."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, data: bytes) -> str:
        import hashlib

        digest = hashlib.sha256(data).hexdigest()
        (self._folder / digest).write_bytes(data)
        return digest
