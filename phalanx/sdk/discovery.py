"""Which cluster is meant when nobody says so, and where ``phalanx up`` keeps its state."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from phalanx.addresses import split_address
from phalanx.errors import InvalidArgument

DEFAULT_ADDRESS = "127.0.0.1:7410"
STATE_FILE = "cluster.json"


def default_state_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the folder of ``phalanx up`` without ``--state``: PHALANX_STATE, else one in the home
    folder."""
    if named := environ.get("PHALANX_STATE"):
        return Path(named)
    home = environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(home) / "phalanx"


def cache_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the folder for downloaded models and data: PHALANX_CACHE, else one in the home
    folder."""
    if named := environ.get("PHALANX_CACHE"):
        return Path(named)
    home = environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home) / "phalanx"


def resolve_addresses(
    given: str | None = None, environ: Mapping[str, str] = os.environ
) -> tuple[str, ...]:
    """Return the addresses to dial; see ``resolve``."""
    return resolve(given, environ).addresses


class Found(NamedTuple):
    """Where a cluster is; ``keys_dir`` has the keys of one with keys on this machine."""

    addresses: tuple[str, ...]
    keys_dir: Path | None = None


def resolve(given: str | None = None, environ: Mapping[str, str] = os.environ) -> Found:
    """Return the addresses to dial: ``given``, else PHALANX_ADDRESS, else the cluster that
    ``phalanx up`` runs on this machine, else the default port. Raises InvalidArgument."""
    text = given if given is not None else environ.get("PHALANX_ADDRESS", "")
    local = _local_cluster(default_state_dir(environ))
    if not text.strip():
        return local or Found((DEFAULT_ADDRESS,))
    addresses = parse_addresses(text)
    # It may be named, too.
    return (
        local if local is not None and set(addresses) <= set(local.addresses) else Found(addresses)
    )


def parse_addresses(text: str) -> tuple[str, ...]:
    """Return the parts of ``HOST:PORT,HOST:PORT``. Raises InvalidArgument."""
    parts = tuple(part.strip() for part in text.split(",") if part.strip())
    if not parts:
        raise InvalidArgument("the address is empty; write HOST:PORT, as 127.0.0.1:7410")
    for part in parts:
        if split_address(part)[1] == 0:
            raise InvalidArgument(f"{part!r} has port 0; give the port that the cluster listens on")
    return parts


def _local_cluster(state_dir: Path) -> Found | None:
    try:
        state = json.loads((state_dir / STATE_FILE).read_text())
        # The file of a supervisor that was killed stays behind; its address is of no use then.
        os.kill(int(state["pid"]), 0)
        address = str(state["address"])
        keys_dir = str(state.get("keys_dir") or "")
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not address:
        return None
    return Found(tuple(address.split(",")), Path(keys_dir) if keys_dir else None)
