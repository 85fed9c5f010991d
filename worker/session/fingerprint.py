"""The numeric fingerprint of this machine, computed once and kept in the cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
from collections.abc import Awaitable, Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from phalanx.files import replace_content
from phalanx.rules import RULES

_LIBRARIES = ("numpy", "scipy", "phalanx")
_OVERRIDES = ("OPENBLAS_CORETYPE", "NPY_DISABLE_CPU_FEATURES", "NPY_ENABLE_CPU_FEATURES")
_CPU_FIELDS = ("model name", "flags", "Features", "CPU implementer", "CPU part")


async def stored_fingerprint(folder: Path, compute: Callable[[], Awaitable[str]]) -> str:
    """The fingerprint as kept for this CPU and these libraries, else what `compute` says."""
    path = folder / f"fingerprint-{machine_key()[:32]}.json"
    try:
        kept = json.loads(path.read_text())["fingerprint"]
        if isinstance(kept, str) and kept:
            return kept
    except (OSError, ValueError, KeyError, TypeError):
        pass
    fingerprint = await compute()
    # On a full disk, say, it is computed again the next time.
    with contextlib.suppress(OSError):
        replace_content(path, json.dumps({"fingerprint": fingerprint}).encode())
    return fingerprint


def machine_key() -> str:
    """A hash of everything that can change the fingerprint."""
    facts = [platform.machine(), platform.python_version(), *_cpu_facts()]
    facts += [f"{name} {_version(name)}" for name in _LIBRARIES] + [f"rules {RULES}"]
    facts += [f"{name}={os.environ.get(name, '')}" for name in _OVERRIDES]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()


def _cpu_facts() -> list[str]:
    """Model and features of the first core; all cores of a machine are taken to be alike."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0]
    except OSError:
        return [platform.processor()]
    return [line for line in first.splitlines() if line.split("\t")[0].strip() in _CPU_FIELDS]


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "none"
