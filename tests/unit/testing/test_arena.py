"""The gate of the chaos tests, and signals to members that are down."""

import importlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

import phalanx
from phalanx.local.state import Member
from phalanx.models.base import DataSchema
from phalanx.specs import load_json
from phalanx.testing import stores
from phalanx.testing.arena import (
    GATED_MODEL,
    SOFTMAX_MODEL,
    TRIES,
    Arena,
    Gate,
    TooLate,
    gated_job,
    in_time,
    leaves_of_a_step,
    not_over,
    stopped,
)
from phalanx.v1.job_pb2 import Job as JobMessage


class Leaf:
    """A leaf of the gated model in this process. What happens while it waits is given by turns:
    each call of `sleep` is one, so nothing depends on time."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.turns = 0

    def run(self, *happenings: Callable[[], object]) -> None:
        """Compute a leaf; in each turn of its wait, the next one of these happens."""
        left = list(happenings)
        self.turns = 0

        def sleep(_: float) -> None:
            self.turns += 1
            left.pop(0)()

        self.module.time = SimpleNamespace(sleep=sleep)
        model = self.module.Gated(DataSchema(2, 3, "float64"))
        model.loss_and_gradients(model.initial(0), np.ones((4, 2)), np.zeros(4, int))
        assert not left, "the leaf went on before all had happened"


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    folder = tmp_path / "gate"
    folder.mkdir()
    return Gate(folder)


@pytest.fixture
def leaf(gate: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Leaf]:
    code = {"softmax": SOFTMAX_MODEL, "gated": GATED_MODEL}
    for name, text in code.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setenv("PHALANX_TEST_GATE", str(gate.folder))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield Leaf(importlib.import_module("gated"))
    for name in code:
        del sys.modules[name]


def test_a_leaf_waits_for_the_gate_and_says_so_only_while_it_does(gate: Gate, leaf: Leaf) -> None:
    leaf.run()
    gate.hold()
    seen = []
    leaf.run(lambda: seen.append(gate.entered()), gate.release)
    assert seen == [{os.getpid()}]
    assert gate.entered() == set()


def test_a_leaf_that_missed_a_release_is_still_seen_in_the_gate(gate: Gate, leaf: Leaf) -> None:
    """The gate is held again before the leaf has looked."""

    def held_anew() -> None:
        gate.release()
        gate.hold()

    gate.hold()
    seen = []
    leaf.run(held_anew, lambda: seen.append(gate.entered()), gate.release)
    assert seen == [{os.getpid()}]


def test_marks_of_leaves_that_are_gone_go_with_the_next_hold(gate: Gate) -> None:
    gate.hold()
    (gate.folder / "entered-4194305").touch()
    gate.release()
    gate.hold()
    assert gate.entered() == set()


def test_as_many_leaves_pass_as_are_let(gate: Gate, leaf: Leaf) -> None:
    gate.hold()
    gate.let_pass(2)
    leaf.run()
    leaf.run()
    leaf.run(gate.release)
    gate.hold()
    leaf.run(lambda: gate.let_pass(1))
    assert gate.entered() == set()
    gate.let_pass(3)
    gate.let_nobody_pass()
    leaf.run(gate.release)


@pytest.mark.parametrize(
    ("train", "leaves"),
    [
        ({}, 11),
        ({"local": {"steps": 3}}, 33),
        ({"verification": {"replicas": 5}}, 33),
        ({"verification": {"audit_fraction": 0.1}}, 22),
    ],
)
def test_as_many_leaves_are_let_pass_as_a_step_has(train: dict[str, Any], leaves: int) -> None:
    spec = load_json(json.dumps(gated_job(shards=11, **train)))
    job = SimpleNamespace(message=JobMessage(spec=spec))
    assert leaves_of_a_step(cast("phalanx.Job", job)) == leaves


def test_a_job_that_is_shown_too_early_a_step_does_not_run_away(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step has 11 leaves; who has just been started knows of none for a moment."""
    monkeypatch.setattr("phalanx.testing.arena.SETTLED_S", 0.0)
    passes, granted = gate.folder / "passes", []
    shown = iter([10, 0, 0, 0, 0, 12, 12, 12])

    def refresh() -> object:
        if any(passes.iterdir()):
            granted.append(len(list(passes.iterdir())))
            gate.let_nobody_pass()  # they are taken
        return SimpleNamespace(progress=SimpleNamespace(step=next(shown)))

    message = JobMessage(spec=load_json(json.dumps(gated_job(shards=11))))
    job = cast("phalanx.Job", SimpleNamespace(id="j", message=message, refresh=refresh, done=False))
    gate.bring_to(job, 10)
    gate.bring_to(job, 12)
    assert granted == [22, 11, 11], "what is missing from the furthest step, then step by step"


def test_few_leaves_are_let_pass_while_an_old_step_is_shown(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody tells of steps while storage starts, and on a busy machine that takes its time."""
    now_s = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now_s
        now_s += seconds

    clock = SimpleNamespace(monotonic=lambda: now_s, sleep=sleep)
    monkeypatch.setattr("phalanx.testing.arena.time", clock)
    granted = 0

    def refresh() -> object:
        nonlocal granted
        granted += len(list((gate.folder / "passes").iterdir()))
        gate.let_nobody_pass()  # they are taken
        step = min(granted // 11, 4) if now_s < 10 else granted // 11
        return SimpleNamespace(progress=SimpleNamespace(step=step))

    message = JobMessage(spec=load_json(json.dumps(gated_job(shards=11))))
    job = cast("phalanx.Job", SimpleNamespace(id="j", message=message, refresh=refresh, done=False))
    gate.bring_to(job, 4)
    gate.bring_to(job, 8)
    assert granted <= 11 * (8 + 5), "10 s are 33 times the age that a shown step may have"


def test_no_leaf_is_let_pass_where_the_step_was_committed_and_is_not_shown(gate: Gate) -> None:
    (gate.folder / "hold").touch()
    message = JobMessage(spec=load_json(json.dumps(gated_job(shards=11))))
    shown = SimpleNamespace(progress=SimpleNamespace(step=3))
    job = SimpleNamespace(id="j", message=message, refresh=lambda: shown, done=False)
    passes = []

    def committed(_: object) -> int:
        passes.extend((gate.folder / "passes").iterdir())
        return 5

    gate.bring_to(cast("phalanx.Job", job), 5, committed)
    assert (passes, gate.furthest) == ([], {"j": 5})


def test_a_job_that_is_over_is_not_waited_for_in_the_gate(gate: Gate) -> None:
    """Its last step is shown before its end, and no leaf of it comes to the gate any more."""
    job = SimpleNamespace(done=False, refresh=lambda: None, wait=lambda timeout_s: None)

    def refresh() -> object:
        job.done = True
        return job

    job.refresh = refresh
    with pytest.raises(AssertionError, match="over before the fault"):
        arena_of(gate, 0).caught_in_a_leaf(cast("phalanx.Job", job))


def test_a_fault_that_comes_too_late_is_injected_into_another_job() -> None:
    over = iter([True, True, False])

    def attempt() -> str:
        not_over(cast("phalanx.Job", SimpleNamespace(done=next(over), wait=lambda timeout_s: None)))
        return "struck"

    assert in_time(attempt) == "struck"
    assert list(over) == []


def test_a_fault_that_never_comes_in_time_fails_as_one_whose_job_failed_does() -> None:
    tries = []

    def attempt() -> None:
        tries.append(1)
        raise TooLate("it was over")

    with pytest.raises(TooLate):
        in_time(attempt)
    assert len(tries) == TRIES

    def fail(timeout_s: float) -> None:
        raise ValueError("why it failed")

    with pytest.raises(ValueError, match="why it failed"):
        in_time(lambda: not_over(cast("phalanx.Job", SimpleNamespace(done=True, wait=fail))))


def arena_of(gate: Gate, pid: int) -> Arena:
    member = Member("worker", "worker-1", pid, "", "", 0, "")
    cluster = SimpleNamespace(process=lambda _: member, processes=lambda: [member])
    return Arena(cast("phalanx.LocalCluster", cluster), gate, cast("stores.Kept", None))


def test_a_member_that_is_down_gets_no_signal(gate: Gate) -> None:
    """0 is its process id, and to the kernel the whole group of who sends."""
    arena_of(gate, os.getpid()).signal("worker-1", 0)
    with pytest.raises(ProcessLookupError, match="down"):
        arena_of(gate, 0).signal("worker-1", 0)


def test_nobody_is_stopped_where_a_member_is_down(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    with pytest.raises(ProcessLookupError, match="down"), stopped(0):
        pass
    with stopped(7):
        pass
    assert sent == [(7, signal.SIGSTOP), (7, signal.SIGCONT)]
