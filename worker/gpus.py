"""Names of GPUs, and which slot has which."""

from __future__ import annotations

import re
from collections.abc import Sequence

NO_GPUS = "none"
_NAME = re.compile(r"\d+|(GPU|MIG)-\S+")


def is_gpu(name: str) -> bool:
    """Whether CUDA takes this for a GPU: a number, or a unique id."""
    return _NAME.fullmatch(name) is not None


def gpus_of_slot(gpus: Sequence[str], slot: int, slots: int) -> tuple[str, ...]:
    """Return the GPUs that the leaves of one slot may use: an equal share, and no one else's."""
    return tuple(gpus[slot * len(gpus) // slots : (slot + 1) * len(gpus) // slots])
