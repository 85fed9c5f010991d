"""The tests of chaos that compare bits: real processes, real signals, one SHA-256 at the end."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

from bench.reliability.rows import Row, Rows

ROOT = Path(__file__).resolve().parents[2]
MARK = "same_bits and not soak"
QUICK_FILE = "tests/chaos/test_corrupt_checkpoint.py"


def run(command: str, *, quick: bool) -> list[Row]:
    """Run them once, and count those that ended with the bits of the undisturbed run."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        arguments = ["-q", "-p", "no:cacheprovider", "-m", MARK, f"--junit-xml={report}"]
        where = QUICK_FILE if quick else "tests/chaos"
        # Exit code 1 says that a test failed; the report says which.
        subprocess.run(
            [sys.executable, "-P", "-m", "pytest", *arguments, where], cwd=ROOT, check=False
        )
        right, missed = verdicts(report.read_text() if report.exists() else "<testsuites />")
    return [
        Rows(command, quick).all_of(
            "chaos_sha_equal",
            "runs of `tests/chaos` on real processes that ended with the SHA-256 of the "
            "undisturbed run",
            len(right),
            "runs",
            trials=len(right) + len(missed),
            note="; ".join(missed[:3]),
        )
    ]


def verdicts(report: str) -> tuple[list[str], list[str]]:
    """The tests of a report in JUnit's format that passed, and those that did anything else."""
    right: list[str] = []
    missed: list[str] = []
    for case in ET.fromstring(report).iter("testcase"):
        bad = any(case.find(kind) is not None for kind in ("failure", "error", "skipped"))
        (missed if bad else right).append(case.get("name", ""))
    return right, missed
