"""Back-off, patience, rates, log lines and the kept fingerprint."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from phalanx.specs.shard_rows import rows_of_shard
from phalanx.v1 import job_spec_pb2, training_pb2
from worker.core.logs import (
    BATCH_LINES,
    BURST_LINES,
    LINE_LIMIT_BYTES,
    Line,
    LineSplitter,
    LogLimiter,
)
from worker.core.patience import Patience
from worker.core.progress import JobProgress
from worker.core.restarts import Restarts
from worker.session.fingerprint import stored_fingerprint


def test_a_first_death_costs_no_wait_and_a_series_costs_more_and_more() -> None:
    restarts = Restarts()
    waits = [restarts.wait_after_death(now_s) for now_s in (0.0, 1.0, 2.0, 3.0)]
    assert waits == [0.0, 0.1, 0.2, 0.4]
    assert max(restarts.wait_after_death(4.0) for _ in range(20)) == 5.0
    assert restarts.wait_after_death(1000.0) == 0.0


def test_patience_ends_when_nothing_moves() -> None:
    patience = Patience(limit_s=1.0, tick_max_s=0.5)
    assert not patience.exhausted("leaf 1", 0.0)
    assert not patience.exhausted("leaf 1", 0.4)
    assert not patience.exhausted("leaf 2", 0.8)
    assert not patience.exhausted("leaf 2", 1.2)
    assert not patience.exhausted("leaf 2", 1.6)
    assert patience.exhausted("leaf 2", 2.0)


def test_an_idle_slot_is_waited_for_without_end() -> None:
    patience = Patience(limit_s=1.0, tick_max_s=0.5)
    assert not any(patience.exhausted(None, now_s) for now_s in range(100))


def test_a_stopped_clock_is_not_taken_for_a_hanging_leaf() -> None:
    patience = Patience(limit_s=1.0, tick_max_s=0.5)
    assert not patience.exhausted("leaf", 0.0)
    assert not patience.exhausted("leaf", 3600.0)


def test_rates_are_smoothed_and_times_have_a_percentile() -> None:
    progress = JobProgress()
    assert progress.leaf_seconds_p95 == 0.0
    progress.examples_per_second(0.0)
    for second in range(1, 20):
        progress.add(100, [0.01] * 9 + [0.5])
        rate = progress.examples_per_second(float(second))
    assert rate == pytest.approx(100, rel=0.01)
    assert progress.leaves_done == 190
    assert progress.leaf_seconds_p95 == 0.5


def test_the_speed_of_leaves_counts_train_rounds_only() -> None:
    progress = JobProgress()
    progress.add(100, [0.25, 0.25])
    progress.add(0, [9.0], trains=False)
    assert (progress.train_leaves, progress.train_leaf_seconds) == (2, 0.5)
    assert progress.leaves_done == 3


def test_waiting_for_rows_is_no_slowness() -> None:
    progress = JobProgress()
    progress.add(100, [5.0, 0.25], waited_s=4.75)
    progress.add(100, [0.25], waited_s=0.2500001)
    assert (progress.train_leaves, progress.train_leaf_seconds) == (3, 0.5)
    assert progress.leaf_seconds_p95 == 5.0


def test_lines_carry_the_context_of_the_tag_before_them() -> None:
    splitter = LineSplitter()
    lines = splitter.feed(b"early\n\x1e3 7 2\nfirst\nsec")
    lines += splitter.feed(b"ond\nunfinished\x1e3 7 4\nlast")
    lines += splitter.end()
    assert lines == [
        Line(-1, -1, -1, "early"),
        Line(3, 7, 2, "first"),
        Line(3, 7, 2, "second"),
        Line(3, 7, 2, "unfinished"),
        Line(3, 7, 4, "last"),
    ]


def test_a_line_without_end_is_cut_whatever_bytes_it_has() -> None:
    splitter = LineSplitter()
    for _ in range(3):
        (line,) = splitter.feed(b"y\x1e" + b"x" * LINE_LIMIT_BYTES)
        assert line.text == "y"
    assert splitter.end() == []


def test_long_and_broken_lines_are_cut_not_kept() -> None:
    splitter = LineSplitter()
    (line,) = splitter.feed(b"x" * 10_000)
    assert len(line.text) == LINE_LIMIT_BYTES
    (line,) = splitter.feed(b"\xff\x1enonsense\n")
    assert line.text == "\N{REPLACEMENT CHARACTER}"


def test_a_flood_is_bounded_and_admitted() -> None:
    limiter = LogLimiter("job-1", "worker-1")
    for index in range(BURST_LINES + 500):
        limiter.add(Line(1, 2, 3, f"line {index}"), "info", 5, now_s=0.0)
    batches = []
    while (batch := limiter.take(9)) is not None:
        assert len(batch.lines) <= BATCH_LINES + 1
        batches.append(batch)
    lines = [line for batch in batches for line in batch.lines]
    assert len(lines) == BURST_LINES + 1
    assert "500 lines were dropped" in lines[-1].text
    assert (lines[0].shard, lines[0].step, lines[0].worker_id) == (3, 2, "worker-1")
    limiter.add(Line(1, 2, 3, "later"), "info", 5, now_s=10.0)
    later = limiter.take(9)
    assert later is not None
    assert later.lines[0].text == "later"


def test_the_first_shard_is_named_too() -> None:
    limiter = LogLimiter("job-1", "worker-1")
    limiter.add(Line(1, 0, 0, "hello"), "info", 5, now_s=0.0)
    batch = limiter.take(9)
    assert batch is not None
    assert batch.lines[0].HasField("shard")


def test_rows_of_a_shard() -> None:
    plan = training_pb2.JobPlan(shards=3, train_rows=10, evaluation_shards=2, evaluation_rows=5)
    assert [rows_of_shard(plan, shard, False) for shard in range(3)] == [(0, 3), (3, 3), (6, 4)]
    assert [rows_of_shard(plan, shard, True) for shard in range(2)] == [(0, 2), (2, 3)]
    plan.spec = job_spec_pb2.JobSpec(data={"rows": {"stratified": True}}).SerializeToString()
    assert rows_of_shard(plan, 1, False) == (0, 0), "they lie apart"
    assert rows_of_shard(plan, 1, True) == (2, 3)


def test_a_slow_trickle_of_lines_always_passes() -> None:
    limiter = LogLimiter("job-1", "worker-1")
    for second in range(3 * BURST_LINES):
        limiter.add(Line(1, 0, 0, "tick"), "info", 5, now_s=float(second))
        batch = limiter.take(9)
        assert batch is not None
        assert [line.text for line in batch.lines] == ["tick"]


def test_lines_outside_of_leaves_have_no_shard() -> None:
    limiter = LogLimiter("job-1", "worker-1")
    limiter.add(Line(1, 2, -1, "set up"), "info", 5, now_s=0.0)
    batch = limiter.take(9)
    assert batch is not None
    assert not batch.lines[0].HasField("shard")


async def test_a_fingerprint_that_cannot_be_kept_is_used_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def compute() -> str:
        return "f" * 8

    def full(*_: Any, **__: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(Path, "write_bytes", full)
        assert await stored_fingerprint(tmp_path, compute) == "f" * 8
    assert await stored_fingerprint(tmp_path, compute) == "f" * 8
    assert len(list(tmp_path.iterdir())) == 1
