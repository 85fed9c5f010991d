"""What may differ between a job and the one that it goes on from."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from phalanx import specs
from phalanx.errors import InvalidArgument
from phalanx.v1.dataset_service_pb2 import Dataset

BASE = """
name: job
data: {name: fashion}
code: {files: {m.py: pass}}
train: {model: {mlp: {hidden: [8]}}, batch_size: 512}
"""


@pytest.fixture
def resolved(make_dataset: Callable[..., Dataset]):
    """Return a function that resolves the base with settings."""

    def prepare(*settings: str):
        return specs.prepare(specs.apply_sets(specs.load_yaml(BASE), settings), make_dataset())

    return prepare


@pytest.mark.parametrize(
    "setting",
    [
        "name=other",
        "labels.run=second",
        "output.model=other",
        "priority=90",
        "resources.min_workers=2",
        "retain=3600s",
        "train.checkpoints.every_steps=7",
        "train.evaluation.every_steps=9",
        "train.start.job=job-1",
        "train.stop.epochs=99",
    ],
)
def test_how_long_and_where_may_be_another(resolved, setting):
    specs.check_same(resolved(setting), resolved(), "job-1")


@pytest.mark.parametrize(
    ("setting", "field", "says"),
    [
        ("seed=7", "seed", "7, and there 0"),
        ("data.shards=5", "data.shards", "5, and there 2"),
        ("code.files={m.py: other}", "code.files", "other values"),
        ("train.batch_size=1024", "train.batch_size", "1024, and there 512"),
        ("train.model.mlp.hidden=[9]", "train.model.mlp.hidden", "other values"),
        ("train.optimizer.sgd.momentum=0.9", "train.optimizer.sgd.momentum", "0.9, and there 0"),
        ("train.optimizer={adam: {}}", "train.optimizer.adam", "given here, and not given there"),
        ("train.all_reduce={}", "train.parameter_server", "not given here, and given there"),
    ],
)
def test_what_made_the_state_must_be_the_same(resolved, setting, field, says):
    settings = [setting] if "shards" in setting else [setting, "data.shards=2"]
    with pytest.raises(InvalidArgument) as caught:
        specs.check_same(resolved(*settings), resolved("data.shards=2"), "job-1")
    assert caught.value.reason == "OTHER_SPEC"
    found = {each.field: each.message for each in caught.value.violations}
    assert says in found[field]
    assert "job-1" in found[field]


def test_all_differences_are_told_at_once(resolved):
    with pytest.raises(InvalidArgument) as caught:
        specs.check_same(resolved("seed=7", "train.dtype=float64"), resolved(), "job-1")
    assert [each.field for each in caught.value.violations] == ["seed", "train.dtype"]


@pytest.mark.parametrize("text", ["", "a b", "../x", "job-1@", "job-1@0", "job-1@x", "@5"])
def test_what_names_no_job_is_refused(resolved, text):
    with pytest.raises(InvalidArgument) as caught:
        resolved(f"train.start={{job: '{text}'}}")
    assert [each.field for each in caught.value.violations] == ["train.start.job"]
    assert "JOB@STEP" in caught.value.violations[0].message


def test_a_step_may_be_said():
    assert specs.parse_reference("job-1") == ("job-1", None)
    assert specs.parse_reference("job-1@20") == ("job-1", 20)


def rest(resolved, *settings: str, steps: int = 60, others_steps: int = 35, elapsed_s: float = 9):
    """Return what is wrong with a job of so many steps that goes on at step 35."""
    reached = specs.Reached("job-1", 35, elapsed_s)
    try:
        specs.check_rest(resolved(*settings).train, steps, others_steps, reached)
    except InvalidArgument as error:
        return {each.field: each.message for each in error.violations}
    return {}


def test_steps_and_time_count_from_the_very_beginning(resolved):
    assert rest(resolved) == {}
    assert rest(resolved, steps=0) == {}
    assert "job-1 is at step 35 already" in rest(resolved, steps=35)["train.stop"]
    found = rest(resolved, "train.stop.wall_time=9s")
    assert "9 s, and job-1 has run for 9 s" in found["train.stop.wall_time"]
    assert rest(resolved, "train.stop.wall_time=10s") == {}


@pytest.mark.parametrize(
    "path", ["train.optimizer", "train.local.steps=2 train.local.outer"], ids=["root", "outer"]
)
def test_rates_that_follow_the_number_of_steps_must_be_the_same(resolved, path):
    *before, optimizer = path.split()
    settings = [*before, f"{optimizer}.schedule.cosine.final_fraction=0.1", "train.stop.steps=60"]
    found = rest(resolved, *settings)
    assert "makes 60 steps, and that of job-1 makes 35 steps" in found["train.stop"]
    assert rest(resolved, *settings, others_steps=60) == {}
