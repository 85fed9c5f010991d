"""The types of events are a contract: whoever follows them relies on the names."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from coordinator.control.core.lifecycle import EVENT_OF
from coordinator.control.core.reports import MEMBER_EVENTS
from coordinator.control.labels import EVENT_TYPES

JOBS = ("QUEUED", "STARTED", "WAITING", "PAUSED", "RESUMED", "SUCCEEDED", "FAILED", "CANCELLED")
WORKERS = ("JOINED", "SUSPECTED", "LOST", "DRAINING", "LEFT", "INELIGIBLE", "QUARANTINED")
CONTRACT = {
    *(f"JOB_{each}" for each in JOBS),
    *(f"WORKER_{each}" for each in WORKERS),
    *("SHARDS_MOVED", "SPECULATION_STARTED", "AGGREGATOR_LOST", "STEPS_REPLAYED"),
    *("CONTROL_TOOK_OVER", "CHECKPOINT_COMMITTED", "CHECKPOINT_CORRUPT"),
    *("STORAGE_UNAVAILABLE", "STORAGE_RESTORED", "NON_FINITE_REFUSED", "POISON_SHARD"),
    *("BIT_IDENTITY_LOST", "RECOVERED", "MODEL_REGISTERED"),
}


def trees() -> Iterator[ast.Module]:
    root = Path(__file__).parents[3]
    for path in (root / "coordinator").rglob("*.py"):
        if path.name == "labels.py":
            continue  # repeats them
        yield ast.parse(path.read_text())


def test_every_type_that_is_emitted_is_in_the_contract() -> None:
    emitted = {
        call.args[0].value
        for tree in trees()
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr == "emit"
        and call.args
        and isinstance(call.args[0], ast.Constant)
    }
    assert len(emitted) > 12, "this finds the calls"
    assert {*emitted, *EVENT_OF.values(), *MEMBER_EVENTS} <= CONTRACT


def test_every_type_of_the_contract_has_a_series_from_the_beginning() -> None:
    assert set(EVENT_TYPES) == CONTRACT


def test_every_type_of_the_contract_is_emitted_somewhere() -> None:
    words = {
        each.value
        for tree in trees()
        for each in ast.walk(tree)
        if isinstance(each, ast.Constant) and isinstance(each.value, str)
    }
    assert not CONTRACT - words
