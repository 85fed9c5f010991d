"""What the options before the command say."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from phalanx.local.state import ClusterState
    from phalanx.sdk.cluster import Cluster


@dataclass(frozen=True)
class Settings:
    """The global options."""

    address: str | None = None
    namespace: str = "default"
    timeout_s: float = 30.0
    json: bool = False
    token_file: str | None = None
    ca: str | None = None
    certificate: str | None = None
    key: str | None = None

    def command(self, *words: str) -> str:
        """Return the command line that people are told for another command on the same cluster."""
        where = () if self.address is None else ("--address", self.address)
        return shlex.join(("phalanx", *where, *words))

    def connect(self) -> Cluster:
        """Return the cluster that the options name; nothing is dialled yet."""
        from phalanx.sdk.cluster import connect

        return connect(
            self.address,
            namespace=self.namespace,
            timeout_s=self.timeout_s,
            token=Path(self.token_file) if self.token_file is not None else None,
            ca=self.ca,
            certificate=self.certificate,
            key=self.key,
        )

    def connect_local(self, state: ClusterState) -> Cluster:
        """Return the cluster that runs on a state folder; its keys lie there."""
        from phalanx.sdk.cluster import connect
        from phalanx.sdk.keys import CA_FILE, TOKEN_FILE

        keys = Path(state.keys_dir) if state.keys_dir else None
        return connect(
            state.address,
            namespace=self.namespace,
            timeout_s=self.timeout_s,
            token=Path(self.token_file) if self.token_file else keys and keys / TOKEN_FILE,
            ca=self.ca or (keys and keys / CA_FILE),
        )


def settings_of(context: typer.Context) -> Settings:
    """Return the global options of a running command."""
    settings = context.find_root().obj
    return settings if isinstance(settings, Settings) else Settings()
