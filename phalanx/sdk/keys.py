"""What a person proves themselves with, from arguments, the environment or the local cluster."""

from __future__ import annotations

import os
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

from phalanx.errors import FailedPrecondition, InvalidArgument
from phalanx.keys.tokens import check_token, read_token
from phalanx.rpc.credentials import ClientKeys, GetToken

CA_FILE, TOKEN_FILE = "ca.pem", "admin.token"
"""In the folder of keys that `phalanx up --secure` makes."""

_Path = str | PathLike[str] | None


def resolve_keys(
    local: Path | None = None,
    *,
    token: str | Path | None = None,
    ca: _Path = None,
    certificate: _Path = None,
    key: _Path = None,
    environ: Mapping[str, str] = os.environ,
) -> ClientKeys | None:
    """Return what to encrypt and to prove oneself with; None: nothing says so.

    What is given comes first, then the environment, then the folder of keys of a cluster that runs
    on this machine. Raises InvalidArgument, also for files that cannot be used.
    """
    if token is None and (named := environ.get("PHALANX_TOKEN_FILE")):
        token = Path(named)
    ca = ca or environ.get("PHALANX_CA")
    certificate = certificate or environ.get("PHALANX_CERTIFICATE")
    key = key or environ.get("PHALANX_KEY")
    if local is not None:
        ca = ca or local / CA_FILE
        token = token if token is not None else local / TOKEN_FILE
    if token is None and not (ca or certificate or key):
        return None
    if bool(certificate) != bool(key):
        raise InvalidArgument("a certificate and its key go together: give --cert and --key")
    getter = _getter(token) if token is not None else None
    try:
        return ClientKeys(
            ca=_path(ca), certificate=_path(certificate), key=_path(key), token=getter
        )
    except FailedPrecondition as error:
        raise InvalidArgument(error.message, reason=error.reason) from error


def _path(value: _Path) -> Path | None:
    return Path(value) if value else None


def _getter(token: str | Path) -> GetToken:
    if isinstance(token, Path):
        read_token(token)
        return lambda: read_token(token)
    checked = check_token(token)
    return lambda: checked
