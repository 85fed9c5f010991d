"""Libraries that are no part of every installation, and which jobs need them on their workers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from phalanx.specs.fields import is_set
from phalanx.v1 import job_spec_pb2


@dataclass(frozen=True)
class Library:
    """One of them: its package, what people call it, and the extra of Phalanx that brings it."""

    package: str
    title: str
    extra: str


TORCH = Library("torch", "PyTorch", "torch")
LIBRARIES = (TORCH,)

_NEEDED = {"train.model.torch": TORCH}
"""By the field of the spec."""


def lacking(spec: job_spec_pb2.JobSpec, installed: Mapping[str, str]) -> str:
    """Return what a job needs and a worker does not have, as a sentence; empty: nothing."""
    for path, library in _NEEDED.items():
        if is_set(spec, path) and library.package not in installed:
            install = f"pip install 'phalanx[{library.extra}]'"
            return f"it has no {library.title}, which {path} needs ({install} there)"
    return ""
