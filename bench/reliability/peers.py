"""What other elastic trainers get wrong, tried here: a test of each, and its verdict.

They drop a healthy shard after a few pre-emptions, take a zombie's late report for another worker's
work, take an unreachable coordinator for the end of the data, and die with their coordinator.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

from bench.reliability.rows import Row, Rows

ROOT = Path(__file__).resolve().parents[2]
_PREEMPTIONS = "tests/chaos/test_preemptions.py::"
TESTS = (
    _PREEMPTIONS
    + "test_a_shard_whose_workers_are_preempted_again_and_again_is_neither_dropped_nor_blamed",
    "tests/unit/aggregation/test_late_reports.py",
    "tests/chaos/test_bad_network.py::test_everything_out_of_reach_is_not_the_end_of_the_data",
    _PREEMPTIONS + "test_the_job_outlives_its_coordinator_and_a_worker_that_dies_with_it",
)
"""One for each, in the order of the first lines."""


def run(command: str, *, quick: bool) -> list[Row]:
    """Run the tests, each by itself; a test that is not there has not passed."""
    passed = sum(passes(test) for test in TESTS)
    return [
        Rows(command, quick).all_of(
            "peers_bugs_absent",
            "what other elastic trainers get wrong, as tests that pass here: a healthy shard "
            "dropped after pre-emptions, a zombie's report taken for another's, no coordinator "
            "taken for no data, death with the coordinator",
            passed,
            "tests",
            trials=len(TESTS),
        )
    ]


def passes(test: str) -> bool:
    """Run one test, or the tests of one file, and say whether all passed and none was left out."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        arguments = ["-q", "-p", "no:cacheprovider", f"--junit-xml={report}", test]
        done = subprocess.run(
            [sys.executable, "-P", "-m", "pytest", *arguments], cwd=ROOT, check=False
        )
        return done.returncode == 0 and all_ran(report.read_text())


def all_ran(report: str) -> bool:
    """Say whether a report in JUnit's format has tests, none of them skipped."""
    suites = list(ET.fromstring(report).iter("testsuite"))
    total = sum(int(suite.get("tests", "0")) for suite in suites)
    return total > 0 and not any(int(suite.get("skipped", "0")) for suite in suites)
