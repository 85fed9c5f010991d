"""What a worker has beside its cores: GPUs, and libraries that not every worker has."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from phalanx.needs import LIBRARIES
from worker.gpus import NO_GPUS, is_gpu

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_DEVICE = re.compile(r"nvidia\d+")


def gpus_here(
    wanted: Sequence[str], environ: Mapping[str, str], devices: Path = Path("/dev")
) -> tuple[str, ...]:
    """Return the GPUs for leaves, as CUDA names them.

    Args:
        wanted: as the worker was told; empty: whatever there is.
        environ: says which of a machine's GPUs this process may use, if it says so.
        devices: where the driver shows GPUs. In a container these are only its own, and CUDA counts
            them from 0, whatever numbers they have here.
    """
    if tuple(wanted) == (NO_GPUS,):
        return ()
    if wanted:
        return tuple(wanted)
    if _VISIBLE in environ:
        names = [each.strip() for each in environ[_VISIBLE].split(",")]
        # To CUDA the first that names none ends the list: with -1 there are no GPUs.
        found = tuple(itertools.takewhile(is_gpu, names))
        return found if len({*found}) == len(found) else ()  # one that is named twice hides all
    try:
        files = [each.name for each in devices.iterdir()]
    except OSError:
        return ()
    return tuple(str(index) for index in range(sum(map(bool, map(_DEVICE.fullmatch, files)))))


def gpu_kinds(gpus: Sequence[str], driver: Path = Path("/proc/driver/nvidia")) -> tuple[str, ...]:
    """Return each kind of these GPUs once, by what the driver calls it; empty: not known.

    Nothing is asked of CUDA, which would take memory of each GPU for as long as the worker lives.
    To CUDA the first GPU is the fastest, so where a machine has several kinds only the ids of GPUs
    tell which is which. A GPU in parts (MIG) computes with as many units as the part has, whatever
    it is called.
    """
    try:
        if any(driver.glob("capabilities/gpu*/mig/gi*")):
            return ()
        shown = [_shown(each) for each in driver.glob("gpus/*/information")]
    except (OSError, ValueError):
        return ()
    kinds = {_kind_of(name, shown) for name in gpus}
    return () if "" in kinds else tuple(sorted(kinds))


def _shown(information: Path) -> dict[str, str]:
    """What the driver tells of one GPU."""
    lines = information.read_text(encoding="utf-8").splitlines()
    parts = (line.partition(":") for line in lines)
    return {key.strip(): value.strip() for key, _, value in parts}


def _kind_of(name: str, shown: Sequence[Mapping[str, str]]) -> str:
    """Return the kind of a GPU by its number or the beginning of its id; empty: not known."""
    kinds = {
        each.get("Model", "")
        for each in shown
        if name.isdigit() or each.get("GPU UUID", "").startswith(name)
    }
    return kinds.pop() if len(kinds) == 1 else ""


def unlike(devices: Mapping[int, str]) -> str:
    """Say which slots have GPUs that give other bits than those of others; empty: none.

    `devices` has for each slot what its GPU computes, as a hash; empty: it uses none.
    """
    slots: dict[str, list[str]] = {}
    for slot, device in sorted(devices.items()):
        if device:
            slots.setdefault(device, []).append(str(slot))
    if len(slots) < 2:
        return ""
    kinds = " and ".join(" ".join(each) for each in slots.values())
    return f"other bits in the slots {kinds}: run a worker for each kind of GPU"


def libraries_here() -> dict[str, str]:
    """Return the version of each library that jobs may ask for, where it is installed."""
    found = {}
    for each in LIBRARIES:
        try:
            found[each.package] = version(each.package)
        except PackageNotFoundError:
            continue
    return found
