"""Keys for tests: an authority in a folder, certificates of all kinds, tokens."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from phalanx.keys import folder, tokens
from phalanx.keys.authority import Authority, Pair
from phalanx.keys.caller import Role, Service
from phalanx.keys.tokens import TokenFile
from phalanx.rpc.credentials import ClientKeys, ServerKeys

TOKENS_FILE = "tokens.json"


class KeyRing:
    """What `phalanx certs init` and `phalanx token create` make, in a folder of its own."""

    def __init__(self, path: Path, hosts: Sequence[str] = ()) -> None:
        self.path = path
        folder.init(path, hosts=hosts)
        self.tokens_path = path / TOKENS_FILE
        self.tokens_path.write_text('{"tokens": []}')

    @property
    def authority(self) -> Authority:
        """Signs more certificates."""
        return Authority.load(self.path)

    @property
    def ca(self) -> Path:
        """The file with what to trust."""
        return self.path / "ca.pem"

    def write(self, name: str, pair: Pair) -> str:
        """Keep a certificate under a name, as those of the folder are; return the name."""
        pair.write(self.path, name)
        return name

    def server(self, name: str = "control", tokens_path: Path | None = None) -> ServerKeys:
        """Return the keys of a server that takes the tokens of this ring."""
        return ServerKeys(
            ca=self.ca,
            certificate=self.path / f"{name}.pem",
            key=self.path / f"{name}.key",
            tokens=TokenFile(tokens_path or self.tokens_path),
        )

    def client(self, name: str = "", token: str = "", ca: Path | None = None) -> ClientKeys:
        """Return the keys of a client, with the certificate of a name, a token, or both."""
        return ClientKeys(
            ca=ca or self.ca,
            certificate=self.path / f"{name}.pem" if name else None,
            key=self.path / f"{name}.key" if name else None,
            token=(lambda: token) if token else None,
        )

    def token(
        self,
        name: str,
        role: Role = Role.SUBMITTER,
        *,
        namespaces: Sequence[str] = ("*",),
        permissions: Sequence[str] = (),
        expires_s: float | None = None,
    ) -> str:
        """Make a token."""
        return tokens.create(
            self.tokens_path,
            name,
            role,
            namespaces=namespaces,
            permissions=permissions,
            expires_s=expires_s,
        )

    def expired(self, service: Service) -> Pair:
        """Return a certificate whose time is over."""
        long_ago = Authority(self.authority.pair, lambda: datetime.now(UTC) - timedelta(days=20))
        return long_ago.issue_node([service], days=10)

    def flags(self, role: str) -> dict[str, object]:
        """Return the settings of a service with its own keys."""
        settings: dict[str, object] = {
            "tls_certificate": self.path / f"{role}.pem",
            "tls_key": self.path / f"{role}.key",
            "tls_ca": self.ca,
        }
        if role in ("control", "storage"):
            settings["tokens"] = self.tokens_path
        return settings
