"""Which commit a figure was measured at."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
UNKNOWN = "unknown"
WRITTEN = ("bench/reliability.json", "bench/results.json", "docs/RELIABILITY.md")
"""What the benchmarks themselves write into the checkout."""


@functools.cache
def measured_at() -> str:
    """The commit at which this program began to measure, by its short hash."""
    return commit_of(ROOT)


def commit_of(root: Path) -> str:
    """The short hash of what is checked out here, with a ``+`` if files were changed since, those
    with figures aside; ``unknown`` where this is no checkout, but a copy of the files."""
    if _git(root, "rev-parse", "--show-toplevel") != str(root):
        return UNKNOWN
    hash = _git(root, "rev-parse", "--short", "HEAD")
    others = [f":(exclude){path}" for path in WRITTEN]
    changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", *others)
    return hash + "+" * bool(changed) if hash else UNKNOWN


def _git(root: Path, *arguments: str) -> str:
    """What git says; empty where it has nothing to say or is not there."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
