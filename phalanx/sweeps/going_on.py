"""Trials that go on to the next round from where they were, and not from step 0.

What a trial keeps lies beside its result and changes no result: whoever does not find it, or finds
that it is of another training, begins anew and comes to the same bits. So it needs no care: it is
dropped with the job, or when it would be too large.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np

from phalanx.errors import PhalanxError
from phalanx.programs import arrays
from phalanx.programs.data import BlobUnavailable
from phalanx.sweeps.rows import Ints
from phalanx.telemetry.logs import get_logger
from phalanx.training.prefixes import Prefix
from phalanx.v1.training_pb2 import JobPlan

Earlier = Callable[[], bytes]
"""Reads what a trial has kept; it may be gone."""

KEPT_BYTES_MAX = 2 * 1024**3
"""All trials of a sweep keep no more than this together: where they would, they keep nothing."""

FORMAT = b"1"
"""Another one where what is kept has another meaning."""

_log = get_logger(__name__)


def of_rows(plan: JobPlan, positions: Ints | None) -> str:
    """Name a training: what is to be done with which rows, and how its first steps are written."""
    digest = hashlib.sha256(FORMAT + plan.SerializeToString(deterministic=True))
    if positions is not None:
        digest.update(np.ascontiguousarray(positions, "<i8").tobytes())
    return digest.hexdigest()


def packed(prefix: Prefix, name: str) -> bytes:
    """Return the first steps of a training as bytes; none where a vector has a type that is not
    written, or where there is no memory for them."""
    try:
        return arrays.pack(prefix.arrays, {"training": name, "root": prefix.root})
    except (KeyError, MemoryError):
        return b""


def prefix_in(earlier: Earlier, name: str) -> Prefix | None:
    """Return what a training goes on from; None: it begins anew."""
    try:
        content = earlier()
        notes = arrays.notes_of(content)
        if notes.get("training") == name:
            return Prefix(arrays.unpack(content), notes["root"])
        why = "it is of another training"
    except (BlobUnavailable, OSError, PhalanxError, KeyError, MemoryError) as error:
        why = str(error) or type(error).__name__
    _log.info("trial_begins_anew", reason=why)
    return None
