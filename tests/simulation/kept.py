"""Outcomes of a long batch in a file, so that one that was broken off goes on where it was.

The first line says which sources made them: outcomes of other code do not count for this one.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import TextIO

from tests.simulation.outcome import Outcome

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("coordinator", "phalanx", "storage", "tests/simulation", "worker")


def sources_sha256() -> str:
    """Return the SHA-256 over all code that a seed runs."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def kept_in(path: Path, made_by: str) -> dict[int, Outcome]:
    """The outcomes in a file by seed; none if it is not there, or is of other code."""
    found: dict[int, Outcome] = {}
    lines = path.read_text().splitlines() if path.exists() else []
    same = bool(lines) and json.loads(lines[0]).get("sources_sha256") == made_by
    for line in lines[1:] if same else []:
        try:
            outcome = _read(line)
        except ValueError:
            break  # the last line, cut off in the middle
        found[outcome.seed] = outcome
    return found


class Kept:
    """A file of outcomes; made where it is not there, or is of other code."""

    def __init__(self, path: Path) -> None:
        made_by = sources_sha256()
        self.outcomes = kept_in(path, made_by)
        """Those that were kept before, by seed."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"sources_sha256": made_by}) + "\n")
        self._file: TextIO = path.open("a")
        for outcome in self.outcomes.values():
            self._file.write(json.dumps(vars(outcome)) + "\n")

    def add(self, outcome: Outcome) -> None:
        """Keep an outcome from now on, whatever happens to this process."""
        self._file.write(json.dumps(vars(outcome)) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _read(line: str) -> Outcome:
    known = json.loads(line)
    for each in fields(Outcome):
        if str(each.type).startswith("Counter"):
            known[each.name] = Counter(known[each.name])
    return Outcome(**known)
