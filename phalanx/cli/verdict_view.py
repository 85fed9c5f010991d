"""What `phalanx verify` writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from phalanx.cli.output import print_fields, say
from phalanx.texts import number_of

if TYPE_CHECKING:
    from phalanx.sdk.verdict import TaskLedger, Verdict
    from phalanx.training.ledger import Ledger

NAMED = 10
"""How many things are named before the rest is only counted; ``--json`` has all of them."""


def print_verdict(verdict: Verdict) -> None:
    """Write what verifying a job has found."""
    print_fields(
        [("job", verdict.job_id), ("steps", verdict.steps), *_ledger(verdict), *_bits(verdict)]
    )
    if verdict.compared and not verdict.equal:
        say(verdict.explanation)


def problems_of(verdict: Verdict) -> list[str]:
    """Return what does not balance, in words."""
    if verdict.tasks is not None:
        return list(_task_problems(verdict.tasks))
    return [] if verdict.ledger is None else list(verdict.ledger.problems)


def _ledger(verdict: Verdict) -> Iterator[tuple[str, object]]:
    if verdict.tasks is not None:
        yield from _tasks(verdict.tasks)
    if verdict.ledger is not None:
        yield from _examples(verdict.ledger)
    elif verdict.tasks is None:
        yield "ledger", "not counted"
        return
    problems = problems_of(verdict)
    yield "ledger", "DOES NOT BALANCE: " + "; ".join(problems) if problems else "balances"


def _examples(ledger: Ledger) -> Iterator[tuple[str, object]]:
    whole = number_of(ledger.epochs, "whole epoch") if ledger.epochs else "none is whole"
    each = number_of(ledger.epoch_examples, "example")
    yield "epochs", f"{whole}, {ledger.exact_epochs:,} with each of {each} exactly once"
    how = f"{ledger.used:,} used, {ledger.left_out:,} left out"
    yield "examples", f"{how}, {ledger.doubled:,} doubled, {ledger.missing:,} missing"
    if ledger.left_out:
        names = [f"shard {each.shard} in step {each.step:,}" for each in ledger.named]
        yield "left out", _listed(names) or "which they were is not written down"


def _tasks(tasks: TaskLedger) -> Iterator[tuple[str, object]]:
    how = f"{tasks.tasks:,}, {tasks.done:,} done, {len(tasks.given_up):,} given up"
    yield "tasks", f"{how}, {len(tasks.doubled):,} doubled, {len(tasks.missing):,} missing"
    yield "given up", _listed([str(task) for task in tasks.given_up])


def _task_problems(tasks: TaskLedger) -> Iterator[str]:
    if tasks.doubled:
        yield f"more than one result: {_listed([str(task) for task in tasks.doubled])}"
    if tasks.missing:
        yield f"no result: {_listed([str(task) for task in tasks.missing])}"


def _bits(verdict: Verdict) -> Iterator[tuple[str, object]]:
    yield "cluster", verdict.cluster_sha256
    yield "this process", verdict.local_sha256
    if verdict.compared:
        yield "verdict", "equal" if verdict.equal else "DIFFERENT"
    elif verdict.not_compared:
        yield "verdict", f"not compared: {verdict.not_compared}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
