"""What `phalanx chaos` makes of a run that harmed nobody."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from phalanx.chaos.report import Commit, Counters, Injected, Report, Span, summarise
from phalanx.cli.commands import chaos
from phalanx.cli.errors import Exit

STEADY = [Commit(step, 0.5 * step) for step in range(1, 61)]
SPARE = Injected(12.0, "kill-aggregator", "aggregator-2", idle=True)
OWNER = Injected(16.0, "kill-aggregator", "aggregator-1")


def report_of(*injected: Injected, state: str = "RUNNING") -> Report:
    spans = [Span(0, 10), Span(20, 30)]
    return summarise(
        STEADY, Span(10, 20), spans, injected, job_id="j", state=state, seed=0, counters=Counters()
    )


def test_success_needs_a_fault_that_mattered() -> None:
    assert chaos._exit_of(report_of()) == Exit.CONFLICT
    assert chaos._exit_of(report_of(SPARE)) == Exit.CONFLICT
    assert chaos._exit_of(report_of(SPARE, OWNER)) == Exit.DONE
    assert chaos._exit_of(report_of(state="FAILED")) == Exit.JOB_FAILED


def test_the_text_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    settings: Any = SimpleNamespace(json=False)
    chaos._show(report_of(SPARE), settings)
    out, err = capsys.readouterr()
    assert "not needed by the job" in out
    assert "1 in 10 s, 1 where the job had nothing" in out
    assert "goodput" not in out
    assert "no process was harmed that the job needed" in err
    chaos._show(report_of(SPARE, OWNER), settings)
    out, err = capsys.readouterr()
    assert "goodput" in out
    assert err == ""
