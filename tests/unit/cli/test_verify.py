"""What `phalanx verify` writes and how it ends."""

from __future__ import annotations

from typing import Any

import pytest

from phalanx.sdk.cluster import Cluster
from phalanx.sdk.verdict import TaskLedger, Verdict
from phalanx.training.ledger import Ledger, LeftOut

BALANCED = Ledger(7, 7, 800, 5600, 0, 0, 0, (), ())
MISSING = Ledger(7, 6, 800, 5590, 0, 0, 10, (), ("10 examples of whole epochs not used",))
LEFT_OUT = Ledger(
    7, 0, 800, 5400, 200, 0, 0, tuple(LeftOut(3, step, 10) for step in range(1, 21)), ()
)
UNNAMED = Ledger(7, 0, 800, 5590, 10, 0, 0, (), ())


def verdict(ledger: Ledger | None = BALANCED, local: str = "aa", **more: Any) -> Verdict:
    return Verdict("job-1", 21, "aa" if ledger else "", local, True, ledger=ledger, **more)


def of_tasks(**more: Any) -> Verdict:
    return verdict(None, "", tasks=TaskLedger(4, **{"done": 4, **more}))


CASES = {
    "equal": (verdict(), 0, ["5,600 used, 0 left out", "ledger        balances", "equal"]),
    "different": (verdict(local="bb"), 1, ["balances", "DIFFERENT", "fingerprint"]),
    "broken": (verdict(local="bb", like_workers=True), 1, ["DIFFERENT", "not a pure function"]),
    "elsewhere": (
        verdict(local="bb", not_compared="another machine"),
        6,
        ["not compared: another"],
    ),
    "missing": (verdict(MISSING), 1, ["DOES NOT BALANCE: 10 examples", "10 missing", "equal"]),
    "not compared": (verdict(local="", not_compared="no log"), 6, ["not compared: no log"]),
    "neither": (verdict(MISSING, "", not_compared="no log"), 1, ["DOES NOT", "not compared"]),
    "left out": (verdict(LEFT_OUT), 0, ["shard 3 in step 1,", "and 10 more", "200 left out"]),
    "unnamed": (verdict(UNNAMED), 0, ["which they were is not written down"]),
    "tasks": (of_tasks(), 0, ["4 done, 0 given up, 0 doubled, 0 missing", "balances"]),
    "given up": (of_tasks(done=3, given_up=(2,)), 0, ["given up  2", "balances"]),
    "doubled": (of_tasks(doubled=(1,)), 1, ["DOES NOT BALANCE: more than one result: 1"]),
    "no result": (of_tasks(done=3, missing=(2,)), 1, ["DOES NOT BALANCE: no result: 2"]),
}


@pytest.mark.parametrize("name", CASES)
def test_text_json_and_exit_code(offline: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    found, code, texts = CASES[name]
    monkeypatch.setattr(Cluster, "get", lambda self, job_id: None)
    monkeypatch.setattr(Cluster, "verify", lambda self, job_id: found)
    outcome = offline("verify", "job-1")
    assert outcome.code == code
    shown = " ".join((outcome.out + outcome.err).splitlines())
    assert [text for text in texts if text not in shown] == []
    outcome = offline("--json", "verify", "job-1")
    assert outcome.code == code
    assert outcome.json() == found.to_json()
    assert outcome.json()["balanced"] is found.balanced
