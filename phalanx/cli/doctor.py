"""``phalanx doctor``: what this machine offers, and what is in the way."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from phalanx.cli.context import Settings
from phalanx.errors import PhalanxError
from phalanx.sdk.discovery import DEFAULT_ADDRESS, resolve_addresses
from phalanx.texts import number_of

OK, NOTE, PROBLEM = "ok", "note", "PROBLEM"
SHARED_MEMORY = "/dev/shm"  # noqa: S108 - looked at, not written to
MEBIBYTE = 1024 * 1024
DISK_LOW_BYTES = 1024 * MEBIBYTE
MEMORY_LOW_BYTES = 1024 * MEBIBYTE
SHARED_MEMORY_LOW_BYTES = 256 * MEBIBYTE
GRPC_AT_LEAST = (1, 84)
_PROBE_TIMEOUT_S = 2.0


@dataclass(frozen=True)
class Check:
    """One finding; ``advice`` is what to do about it."""

    name: str
    state: str
    message: str
    advice: str = ""

    def to_json(self) -> dict[str, object]:
        """Return the JSON of one finding."""
        state = self.state.lower()
        return {"name": self.name, "state": state, "message": self.message, "advice": self.advice}


def examine(state_dir: Path, settings: Settings) -> list[Check]:
    """Return all findings; takes a few seconds at most."""
    return [
        _python(),
        *_libraries(),
        _processors(),
        _blas(),
        _memory(),
        _shared_memory(),
        _disk(state_dir),
        _port(),
        *_proxy(),
        _cluster(settings),
    ]


def _python() -> Check:
    return Check("python", OK, f"{platform.python_version()} ({sys.executable})")


def _libraries() -> list[Check]:
    checks = []
    for name in ("grpcio", "numpy", "protobuf"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            advice = "install Phalanx again; `pip install phalanx` brings it"
            checks.append(Check(name, PROBLEM, "is missing", advice))
            continue
        numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
        if name == "grpcio" and numbers < GRPC_AT_LEAST:
            advice = (
                "older releases unfold compressed messages without limit; install 1.84 or newer"
            )
            checks.append(Check(name, PROBLEM, version, advice))
        else:
            checks.append(Check(name, OK, version))
    return checks


def _processors() -> Check:
    usable, present = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    limited = f" of {present}" if usable < present else ""
    return Check("processors", OK, f"{usable}{limited} usable, {platform.machine()}")


def _blas() -> Check:
    import numpy as np

    config = np.show_config(mode="dicts")
    found = config.get("Build Dependencies", {}).get("blas", {}) if config else {}
    name = f"{found.get('name', 'unknown')} {found.get('version', '')}".strip()
    return Check(
        "blas", OK, f"{name}; leaf processes use one thread each, whatever the environment"
    )


def _memory() -> Check:
    import psutil

    available = psutil.virtual_memory().available
    text = f"{available // MEBIBYTE:,} MiB available"
    if available < MEMORY_LOW_BYTES:
        return Check("memory", NOTE, text, "start fewer workers: phalanx up --workers 1")
    return Check("memory", OK, text)


def _shared_memory() -> Check:
    try:
        free = shutil.disk_usage(SHARED_MEMORY).free
    except OSError:
        advice = "workers need shared memory; mount it"
        return Check(SHARED_MEMORY, PROBLEM, "does not exist", advice)
    text = f"{free // MEBIBYTE:,} MiB free"
    if free < SHARED_MEMORY_LOW_BYTES:
        advice = "workers keep parameters there; in Docker give --shm-size=1g"
        return Check(SHARED_MEMORY, NOTE, text, advice)
    return Check(SHARED_MEMORY, OK, text)


def _disk(state_dir: Path) -> Check:
    folder = state_dir
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        return Check("disk", PROBLEM, f"cannot write to {folder}", "give another --state folder")
    free = shutil.disk_usage(folder).free
    text = f"{free // MEBIBYTE:,} MiB free for {state_dir}"
    if free < DISK_LOW_BYTES:
        return Check("disk", NOTE, text, "free some space, or give another --state folder")
    return Check("disk", OK, text)


def _port() -> Check:
    host, _, port = DEFAULT_ADDRESS.rpartition(":")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(port)))
        except OSError:
            return Check("port", NOTE, f"{port} is in use, by a running cluster or another program")
    return Check("port", OK, f"{port} is free")


def _proxy() -> list[Check]:
    names = [name for name in ("http_proxy", "https_proxy") if os.environ.get(name)]
    if not names:
        return []
    return [Check("proxy", OK, f"{', '.join(names)} is set; Phalanx does not use it")]


def _cluster(settings: Settings) -> Check:
    address = settings.address
    shown = address or ""
    try:
        shown = ",".join(resolve_addresses(address))
        with replace(settings, timeout_s=_PROBE_TIMEOUT_S).connect() as cluster:
            found = cluster.describe()
    except PhalanxError as error:
        # Only a cluster that was asked for must be there.
        asked = address is not None or bool(os.environ.get("PHALANX_ADDRESS"))
        advice = "start one with `phalanx up`" if not asked else error.message
        return Check("cluster", PROBLEM if asked else NOTE, f"none answers at {shown}", advice)
    if not found.storage_available:
        return Check("cluster", PROBLEM, f"{shown}: storage does not answer", "phalanx status")
    return Check(
        "cluster",
        OK,
        f"{shown}: version {found.version}, {number_of(len(found.workers), 'worker')}",
    )
