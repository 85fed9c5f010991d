import io

import pytest
from rich.console import Console

from phalanx.cli.watch_state import MOVED_S, WatchState, ranges_text
from phalanx.cli.watch_view import progress_text, render, shard_cells, sparkline
from phalanx.v1 import job_pb2, job_service_pb2, job_spec_pb2


def owners(**ranges):
    progress = job_pb2.Progress(
        step=12, total_steps=100, epoch=1.5, examples_per_second=41230, metrics={"train/loss": 0.43}
    )
    for worker_id, (first, count) in ranges.items():
        progress.workers.add(
            worker_id=worker_id.replace("_", "-"),
            shards=[job_pb2.ShardRange(first=first, count=count)] if count else [],
            examples_per_second=1000,
        )
    return job_service_pb2.WatchJobResponse(progress=progress)


def lost(worker_id):
    event = job_pb2.Event(sequence=1, type="WORKER_LOST", worker_id=worker_id, message="reset")
    return job_service_pb2.WatchJobResponse(event=event)


@pytest.fixture
def state():
    spec = job_spec_pb2.JobSpec(data=job_spec_pb2.Data(name="fashion", shards=8))
    return WatchState(job_pb2.Job(id="f-1", spec=spec, state=job_pb2.Job.STATE_RUNNING))


def drawn(state, now_s=0.0, width=80):
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(render(state, now_s, width))
    return console.file.getvalue()


def test_shows_progress_numbers_and_who_has_which_shards(state):
    state.feed(owners(worker_1=(0, 4), worker_2=(4, 4)), 0.0)
    text = drawn(state)
    assert "step 12/100" in text
    assert "train/loss 0.4300" in text
    assert "41,230" in text
    assert "worker-1  ████····" in text
    assert "worker-2  ····████" in text


def test_a_death_moves_the_shards_and_marks_them_for_a_while(state):
    state.feed(owners(worker_1=(0, 4), worker_2=(4, 4)), 0.0)
    state.feed(lost("worker-2"), 1.0)
    state.feed(owners(worker_1=(0, 8)), 1.1)
    text = drawn(state, 1.2)
    assert "worker-1  ████████" in text
    assert "worker-2  ········    lost" in text
    assert "WORKER_LOST worker-2 reset" in text
    row = state.workers["worker-1"]
    styles = [str(span.style) for span in shard_cells(state, row, 1.2).spans]
    assert styles == ["blue"] * 4 + ["yellow"] * 4
    later = [str(span.style) for span in shard_cells(state, row, 1.2 + MOVED_S).spans]
    assert later == ["blue"] * 8


def test_a_worker_that_comes_back_is_not_lost_any_more(state):
    state.feed(lost("worker-2"), 1.0)
    state.feed(owners(worker_2=(0, 8)), 2.0)
    assert state.workers["worker-2"].note == ""


def test_checkpoints_do_not_push_out_what_happened_to_a_worker(state):
    state.feed(lost("worker-1"), 0.0)
    for step in range(10):
        event = job_pb2.Event(type="CHECKPOINT_COMMITTED", message=f"step {step} is durable")
        state.feed(job_service_pb2.WatchJobResponse(event=event), 0.0)
    text = drawn(state)
    assert "WORKER_LOST" in text
    assert text.count("CHECKPOINT_COMMITTED") == 1
    assert "step 9 is durable" in text


@pytest.mark.parametrize("width", [60, 80, 200])
def test_no_line_is_wider_than_the_terminal(state, width):
    state.job.spec.data.shards = 1000
    names = {f"a_worker_with_a_long_name_{n}": (n * 100, 100) for n in range(10)}
    state.feed(owners(**names), 0.0)
    state.feed(lost("a-worker-with-a-long-name-1" * 4), 0.0)
    for step in range(200):
        progress = job_pb2.Progress(step=step, metrics={"train/loss": 1 / (step + 1)})
        state.feed(job_service_pb2.WatchJobResponse(progress=progress), 0.0)
    assert max(map(len, drawn(state, width=width).splitlines())) <= width


def test_many_shards_share_a_cell(state):
    state.job.spec.data.shards = 64
    state.feed(owners(worker_1=(0, 3), worker_2=(3, 61)), 0.0)
    cells = shard_cells(state, state.workers["worker-1"], 0.0).plain
    assert len(cells) == 32
    assert cells.startswith("█▒·")


def test_a_job_that_stops_early_fills_its_bar(state):
    state.feed(owners(worker_1=(0, 8)), 0.0)
    done = job_pb2.Job(id="f-1", state=job_pb2.Job.STATE_SUCCEEDED)
    state.feed(job_service_pb2.WatchJobResponse(job=done), 1.0)
    bar = drawn(state).splitlines()[1]
    assert bar.count("━") > 30


def test_plain_line(state):
    state.feed(owners(worker_1=(0, 3), worker_2=(4, 4)), 0.0)
    assert progress_text(state) == (
        "step 12/100 epoch 1.50 train/loss=0.4300 examples/s=41230 worker-1:0-2 worker-2:4-7"
    )


def test_which_evaluation_is_kept_so_far(state):
    message = owners(worker_1=(0, 8))
    assert "best" not in drawn(state)
    best = job_pb2.BestEvaluation(step=1234, metric="test/accuracy", value=0.875)
    message.progress.best.CopyFrom(best)
    state.feed(message, 0.0)
    assert "best test/accuracy 0.8750 at step 1,234\n" in drawn(state)
    assert "train/loss=0.4300 best test/accuracy=0.8750@1234 examples/s" in progress_text(state)


@pytest.mark.parametrize(
    ("shards", "text"),
    [(set(), ""), ({3}, "3"), ({0, 1, 2, 3, 8}, "0-3 8"), ({1, 3, 5}, "1 3 5")],
)
def test_ranges(shards, text):
    assert ranges_text(frozenset(shards)) == text


def test_sparkline_keeps_the_ends_and_leaves_out_what_is_not_finite():
    assert sparkline([1.0], 8) == ""
    assert sparkline([8.0, float("nan"), 1.0], 8) == "█▁"
    line = sparkline([float(100 - n) for n in range(100)], 10)
    assert (len(line), line[0], line[-1]) == (10, "█", "▁")
    assert sparkline([2.0, 2.0], 4) == "▁▁"


@pytest.fixture
def tasks():
    spec = job_spec_pb2.JobSpec()
    spec.tasks.entrypoint = "calls:add"
    state = WatchState(job_pb2.Job(id="t-1", spec=spec, state=job_pb2.Job.STATE_RUNNING))
    progress = job_pb2.Progress(step=12, total_steps=3000, examples_per_second=4100)
    progress.metrics.update({"tasks/given_up": 2, "tasks/failed_tries": 1500})
    for worker_id, per_second in (("worker-1", 2090), ("worker-2", 2010)):
        progress.workers.add(worker_id=worker_id, examples_per_second=per_second)
    state.feed(job_service_pb2.WatchJobResponse(progress=progress), 0.0)
    return state


def test_a_set_of_tasks_has_tasks_and_neither_steps_nor_shards(tasks):
    text = drawn(tasks)
    assert "tasks 12/3,000" in text
    assert "tasks/given_up 2 " in text
    assert "tasks/failed_tries 1,500" in text
    assert "tasks/s 4,100" in text
    assert "2,090" in text
    assert not any(word in text for word in ("step", "epoch", "shard", "ex/s", "examples"))


def test_a_lost_worker_does_no_tasks(tasks):
    tasks.feed(lost("worker-2"), 1.0)
    row = next(line for line in drawn(tasks).splitlines() if line.startswith("worker-2"))
    assert row.split() == ["worker-2", "lost"]


def test_plain_line_of_a_set_of_tasks(tasks):
    assert progress_text(tasks) == (
        "tasks 12/3000 tasks/failed_tries=1500 tasks/given_up=2 tasks/s=4100"
    )
