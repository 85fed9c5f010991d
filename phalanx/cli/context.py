"""What the options before the command say."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from phalanx.sdk.cluster import Cluster


@dataclass(frozen=True)
class Settings:
    """The global options."""

    address: str | None = None
    namespace: str = "default"
    timeout_s: float = 30.0
    json: bool = False

    def command(self, *words: str) -> str:
        """Return the command line that people are told for another command on the same cluster."""
        where = () if self.address is None else ("--address", self.address)
        return shlex.join(("phalanx", *where, *words))

    def connect(self) -> Cluster:
        """Return the cluster that the options name; nothing is dialled yet."""
        from phalanx.sdk.cluster import connect

        return connect(self.address, namespace=self.namespace, timeout_s=self.timeout_s)


def settings_of(context: typer.Context) -> Settings:
    """Return the global options of a running command."""
    settings = context.find_root().obj
    return settings if isinstance(settings, Settings) else Settings()
