"""Sets of independent tasks on real processes, and in one: what people see of them."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import phalanx
from phalanx.cli.main import run
from phalanx.errors import FailedPrecondition, InvalidArgument, NotFound
from phalanx.sdk.job import Job, JobFailed
from phalanx.tasks import INLINE_BYTES, TASKS_MAX, journal_stream
from phalanx.testing.arena import GUARD_S, wait_until
from phalanx.testing.datasets import REPOSITORY
from phalanx.testing.scraping import scrape
from phalanx.v1.job_spec_pb2 import JobSpec

CODE = """
import os
import time
from pathlib import Path

import numpy as np


def add(a, b=10):
    print(f"adding {a}")
    assert isinstance(a, int)
    return {"sum": a + b, "array": np.arange(3)}


def large(size):
    return "x" * size


def picky(number, folder, how="raise"):
    with open(Path(folder) / f"ran-{number}", "a") as file:
        file.write("x")
    if number == 3 and not (Path(folder) / "mended").exists():
        if how == "exit":
            os._exit(7)
        raise ValueError(f"{number} is not liked")
    return number


def slow(folder, number):
    (Path(folder) / f"slow-{number}").touch()
    time.sleep(600)


def no_json():
    return {1, 2}
"""


def document(function: str, arguments: list[dict[str, Any]], **tasks: Any) -> dict[str, Any]:
    return {
        "name": "calls",
        "code": {"files": {"calls.py": CODE}},
        "tasks": {"entrypoint": f"calls:{function}", "arguments": arguments, **tasks},
    }


@pytest.fixture(scope="module")
def local() -> Iterator[phalanx.LocalCluster]:
    with phalanx.LocalCluster(workers=2, slots=1) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def alone() -> Iterator[phalanx.Cluster]:
    with phalanx.LocalCluster(workers=0) as cluster:
        yield cluster


@pytest.fixture(params=["processes", "in process"])
def cluster(request: pytest.FixtureRequest) -> phalanx.Cluster:
    name = "local" if request.param == "processes" else "alone"
    found: phalanx.Cluster = request.getfixturevalue(name)
    return found


def values(job: Job) -> list[Any]:
    assert [each.task for each in job.results()] == list(range(len(job.results())))
    return [each.value for each in job.results()]


def test_results_are_what_the_function_returned(cluster: phalanx.Cluster) -> None:
    job = cluster.submit(document("add", [{"a": 1}, {"a": 2, "b": 3}]))
    result = job.wait(timeout_s=GUARD_S)
    assert result.steps == 2
    assert result.model == ""
    assert values(job) == [{"sum": 11, "array": [0, 1, 2]}, {"sum": 5, "array": [0, 1, 2]}]
    assert [each.value["sum"] for each in job.results([1])] == [5]
    progress = job.refresh().progress
    assert (progress.step, progress.total_steps) == (2, 2)


def test_large_results_come_from_storage(cluster: phalanx.Cluster) -> None:
    sizes = [INLINE_BYTES * 4, 10, INLINE_BYTES * 100]
    job = cluster.submit(document("large", [{"size": size} for size in sizes]))
    job.wait(timeout_s=GUARD_S)
    assert [len(value) for value in values(job)] == sizes


def test_large_results_stay_through_a_collection_and_go_with_their_job(
    local: phalanx.LocalCluster,
) -> None:
    from phalanx.sdk.methods import COLLECT_GARBAGE
    from phalanx.v1.storage_service_pb2 import CollectGarbageRequest

    job = local.submit(document("large", [{"size": INLINE_BYTES * 3}]))
    job.wait(timeout_s=GUARD_S)
    everything = CollectGarbageRequest(grace_s=0)
    local.backend.call(COLLECT_GARBAGE, everything)
    assert len(values(job)[0]) == INLINE_BYTES * 3
    job.delete()
    wait_until(
        lambda: local.backend.call(COLLECT_GARBAGE, everything).bytes_removed > INLINE_BYTES,
        "the value to be garbage",
    )


def test_a_task_that_fails_again_and_again_is_named_and_a_retry_goes_on(
    cluster: phalanx.Cluster, tmp_path: Path
) -> None:
    arguments = [{"number": number, "folder": str(tmp_path)} for number in range(6)]
    job = cluster.submit(document("picky", arguments))
    with pytest.raises(JobFailed, match="3 is not liked") as caught:
        job.wait(timeout_s=GUARD_S)
    [failure] = caught.value.failures
    assert (failure.code, failure.task, failure.attempts) == ("POISON_TASK", 3, 3)
    assert 'raise ValueError(f"{number} is not liked")' in failure.traceback
    assert (tmp_path / "ran-3").read_text() == "xxx"
    done = {each.task for each in job.results() if each.failure is None}
    (tmp_path / "mended").touch()
    job.retry()
    job.wait(timeout_s=GUARD_S)
    assert values(job) == list(range(6))
    assert all((tmp_path / f"ran-{task}").read_text() == "x" for task in done)


def test_others_go_on_where_the_job_says_so(cluster: phalanx.Cluster, tmp_path: Path) -> None:
    arguments = [{"number": number, "folder": str(tmp_path)} for number in range(6)]
    job = cluster.submit(document("picky", arguments, on_failure={"go_on": {}}, attempts=1))
    result = job.wait(timeout_s=GUARD_S)
    assert result.metrics["tasks/given_up"] == 1
    assert [each.task for each in job.results() if each.failure is not None] == [3]
    assert (tmp_path / "ran-3").read_text() == "x"


def test_a_process_that_dies_names_its_task(local: phalanx.LocalCluster, tmp_path: Path) -> None:
    arguments = [{"number": number, "folder": str(tmp_path), "how": "exit"} for number in range(5)]
    job = local.submit(document("picky", arguments))
    with pytest.raises(JobFailed, match="exit status 7") as caught:
        job.wait(timeout_s=GUARD_S)
    assert [each.task for each in caught.value.failures] == [3]


def test_a_call_without_an_end_is_killed(local: phalanx.LocalCluster, tmp_path: Path) -> None:
    arguments = [{"folder": str(tmp_path), "number": 0}]
    job = local.submit(document("slow", arguments, timeout="1s", attempts=1))
    with pytest.raises(JobFailed, match="no end after 1 s"):
        job.wait(timeout_s=GUARD_S)


def test_a_cancelled_job_frees_its_workers(local: phalanx.LocalCluster, tmp_path: Path) -> None:
    arguments = [{"folder": str(tmp_path), "number": number} for number in range(2)]
    job = local.submit(document("slow", arguments))
    wait_until(lambda: len(list(tmp_path.glob("slow-*"))) == 2, "both to run")
    job.cancel()
    assert job.refresh().state == "CANCELLED"
    after = local.submit(document("add", [{"a": 1}]))
    after.wait(timeout_s=GUARD_S)


def ends(process: Any, name: str) -> dict[tuple[str, str], float]:
    """Values of a metric of one process by its labels `program` and `outcome`."""
    found = {}
    for (each, labels), value in scrape(process.metrics_address).items():
        if each == name:
            of = dict(labels)
            found[of["program"], of["outcome"]] = value
    return found


def test_control_counts_each_attempt_by_how_it_ended(
    local: phalanx.LocalCluster, tmp_path: Path
) -> None:
    control, workers = local.process("control-1"), ("worker-1", "worker-2")
    before = ends(control, "phalanx_tasks_total")
    arguments = [{"number": number, "folder": str(tmp_path)} for number in range(6)]
    local.submit(document("picky", arguments, on_failure={"go_on": {}}, attempts=2)).wait(GUARD_S)
    local.submit(document("picky", arguments[:3])).wait(GUARD_S)

    def of_workers() -> Counter[tuple[str, str]]:
        total: Counter[tuple[str, str]] = Counter()
        for worker in workers:
            counted = ends(local.process(worker), "phalanx_leaf_seconds_count")
            total.update({key: int(value) for key, value in counted.items() if value})
        return total

    wait_until(
        lambda: Counter(ends(control, "phalanx_tasks_total")) == of_workers(),
        "control to count what the workers have",
    )
    after = ends(control, "phalanx_tasks_total")
    assert after["tasks", "raised"] - before.get(("tasks", "raised"), 0) >= 2
    assert after["tasks", "done"] - before.get(("tasks", "done"), 0) >= 5 + 3


def test_what_is_no_json_is_said(cluster: phalanx.Cluster) -> None:
    job = cluster.submit(document("no_json", [{}], attempts=1))
    with pytest.raises(JobFailed, match="is no JSON"):
        job.wait(timeout_s=GUARD_S)


def test_what_it_prints_is_in_the_log(local: phalanx.LocalCluster) -> None:
    job = local.submit(document("add", [{"a": 41}]))
    job.wait(timeout_s=GUARD_S)
    wait_until(lambda: any(line.text == "adding 41" for line in job.logs()), "the line")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arguments": []}, "tasks.arguments: is missing"),
        ({"entrypoint": ""}, "tasks.entrypoint: is missing"),
        ({"entrypoint": "calls"}, "is not module:function"),
        ({"attempts": 0}, "tasks.attempts: must be at least 1"),
        ({"on_failure": {"go_on": {"max_tasks": -1}}}, "must be at least 0"),
    ],
)
def test_wrong_sets_are_refused(
    cluster: phalanx.Cluster, change: dict[str, Any], message: str
) -> None:
    wrong = document("add", [{"a": 1}])
    wrong["tasks"].update(change)
    with pytest.raises(InvalidArgument, match=message):
        cluster.submit(wrong)


def test_too_many_tasks_and_what_makes_no_sense_are_refused(cluster: phalanx.Cluster) -> None:
    spec = JobSpec(name="many")
    spec.tasks.entrypoint = "calls:add"
    for _ in range(TASKS_MAX + 1):
        spec.tasks.arguments.add()
    with pytest.raises(InvalidArgument, match=f"at most {TASKS_MAX} are allowed"):
        cluster.submit(spec)
    data = {**document("add", [{"a": 1}]), "data": {"name": "x"}, "seed": 3}
    with pytest.raises(InvalidArgument) as caught:
        cluster.submit(data)
    assert {each.field for each in caught.value.violations} == {"data", "seed"}


@pytest.mark.parametrize(
    ("entrypoint", "message"),
    [("calls:missing", "has no function 'missing'"), ("nowhere:run", "no module 'nowhere'")],
)
def test_an_entrypoint_that_is_not_there_is_named(
    cluster: phalanx.Cluster, entrypoint: str, message: str
) -> None:
    wrong = document("add", [{"a": 1}])
    wrong["tasks"]["entrypoint"] = entrypoint
    job = cluster.submit(wrong)
    with pytest.raises(JobFailed, match=message):
        job.wait(timeout_s=GUARD_S)


def test_other_jobs_have_no_results_of_tasks(cluster: phalanx.Cluster) -> None:
    with pytest.raises(NotFound):
        cluster.get("nothing-aaaaaaaa")
    cluster.data.add(f"d{os.getpid()}", [[1.0], [2.0]], [0.0, 1.0], task="regression")
    train = {"model": {"linear_regression": {}}, "stop": {"steps": 1}}
    job = cluster.submit({"name": "t", "data": {"name": f"d{os.getpid()}"}, "train": train})
    job.wait(timeout_s=GUARD_S)
    with pytest.raises(FailedPrecondition, match="no set of tasks"):
        job.results()


def test_the_command_shows_results(
    local: phalanx.LocalCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    example = REPOSITORY / "examples" / "tasks" / "job.yaml"
    assert run(["--address", local.address, "submit", str(example)]) == 0
    job = local.get(capsys.readouterr().out.strip())
    job.wait(timeout_s=GUARD_S)
    assert run(["--address", local.address, "--json", "results", job.id]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["task"] for line in lines] == list(range(8))
    inside = sum(line["value"]["inside"] for line in lines)
    assert abs(4 * inside / 160_000 - 3.1416) < 0.02
    assert run(["--address", local.address, "results", job.id, "--task", "2"]) == 0
    assert capsys.readouterr().out.startswith('2\t{"inside": ')
    assert run(["--address", local.address, "results", job.id, "--failed"]) == 0
    assert capsys.readouterr().out == ""


def test_the_code_of_the_example_is_the_file_beside_it() -> None:
    folder = REPOSITORY / "examples" / "tasks"
    spec = phalanx.load(folder / "job.yaml")
    for name, text in spec.code.files.items():
        assert (folder / name).read_text() == text


def test_results_go_with_their_job(local: phalanx.LocalCluster) -> None:
    from phalanx.sdk.methods import READ_JOURNAL
    from phalanx.v1.storage_service_pb2 import ReadJournalRequest

    job = local.submit(document("add", [{"a": 1}]))
    job.wait(timeout_s=GUARD_S)
    request = ReadJournalRequest(stream=journal_stream(job.id))

    def records() -> int:
        return sum(len(page.records) for page in local.backend.stream(READ_JOURNAL, request))

    assert records() > 0
    job.delete()
    wait_until(lambda: records() == 0, "the journal of the results to go")
