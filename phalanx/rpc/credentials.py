"""TLS for servers and channels, from files that are read again whenever they change.

A server looks at each handshake, a client at each call: what changed counts from the next
connection on, and connections that are open stay open.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from phalanx.errors import PhalanxError
from phalanx.keys.caller import Service, service_name
from phalanx.keys.files import Watched, check_pair, check_trusted
from phalanx.keys.tokens import TokenFile
from phalanx.telemetry.logs import get_logger

if TYPE_CHECKING:
    from phalanx.config import ServiceConfig

AUTHORIZATION = "authorization"

_log = get_logger(__name__)

GetToken = Callable[[], str]


class ClientKeys:
    """What a client trusts, and what it proves itself with: a certificate, a token, or both.

    Without `ca` the machine's own certificates are trusted. Raises FailedPrecondition where a file
    cannot be used.
    """

    def __init__(
        self,
        *,
        ca: Path | None = None,
        certificate: Path | None = None,
        key: Path | None = None,
        token: GetToken | None = None,
    ) -> None:
        paths = [path for path in (ca, certificate, key) if path is not None]

        def parse(contents: Sequence[bytes]) -> grpc.ChannelCredentials:
            return self._credentials(dict(zip(paths, contents, strict=True)))

        self._ca, self._certificate, self._key, self._token = ca, certificate, key, token
        self._watched = Watched(paths, parse)
        self._watched.read()

    @classmethod
    def of(cls, config: ServiceConfig) -> ClientKeys | None:
        """Return what a service is configured with; None: it has no keys."""
        if config.tls_ca is None:
            return None
        return cls(ca=config.tls_ca, certificate=config.tls_certificate, key=config.tls_key)

    def current(self) -> tuple[int, grpc.ChannelCredentials]:
        """Return the number of the present version, and what a new connection needs."""
        return self._watched.read()

    def _credentials(self, contents: dict[Path, bytes]) -> grpc.ChannelCredentials:
        ca = certificate = key = None
        if self._ca is not None:
            check_trusted(self._ca)
            ca = contents[self._ca]
        if self._certificate is not None and self._key is not None:
            check_pair(self._certificate, self._key)
            certificate, key = contents[self._certificate], contents[self._key]
        credentials = grpc.ssl_channel_credentials(ca, key, certificate)
        if self._token is None:
            return credentials
        # gRPC itself sends these over TLS only.
        bearer = grpc.metadata_call_credentials(_Bearer(self._token), name="bearer")
        return grpc.composite_channel_credentials(credentials, bearer)


class _Bearer(grpc.AuthMetadataPlugin):
    """Gives each call the token, which may have been replaced meanwhile."""

    def __init__(self, token: GetToken) -> None:
        self._token = token

    def __call__(
        self, context: grpc.AuthMetadataContext, callback: grpc.AuthMetadataPluginCallback
    ) -> None:
        try:
            callback(((AUTHORIZATION, f"Bearer {self._token()}"),), None)
        except PhalanxError as error:
            callback((), error)


class ServerKeys:
    """What a server proves itself with, whose certificates it takes, and which tokens.

    Raises FailedPrecondition where a file cannot be used.
    """

    def __init__(
        self, *, ca: Path, certificate: Path, key: Path, tokens: TokenFile | None = None
    ) -> None:
        self.tokens = tokens
        self._ca, self._certificate, self._key = ca, certificate, key
        self._watched = Watched((ca, certificate, key), self._configuration)
        self._watched.read()
        if tokens is not None:
            tokens.check()

    @classmethod
    def of(cls, config: ServiceConfig, tokens: Path | None = None) -> ServerKeys | None:
        """Return what a service is configured with; None: it has no keys."""
        if config.tls_ca is None or config.tls_certificate is None or config.tls_key is None:
            return None
        return cls(
            ca=config.tls_ca,
            certificate=config.tls_certificate,
            key=config.tls_key,
            tokens=TokenFile(tokens) if tokens is not None else None,
        )

    def credentials(self, *, mutual: bool) -> grpc.ServerCredentials:
        """Return what a port needs; where it is `mutual`, callers must have a certificate."""
        known, first = self._watched.read()
        lock = threading.Lock()

        def changed() -> grpc.ServerCertificateConfiguration | None:
            nonlocal known
            try:
                version, configuration = self._watched.read()
            except Exception as error:  # noqa: BLE001 - gRPC calls this and takes no exception
                _log.warning("keys_not_read", reason=type(error).__name__)
                return None
            with lock:
                # A handshake that looked before another one must not bring the keys before back.
                if version <= known:
                    return None
                known = version
            _log.info("keys_changed")
            return configuration

        # What is None is "as before", which the type stubs do not know.
        fetch: Any = changed
        return grpc.dynamic_ssl_server_credentials(
            first, fetch, require_client_authentication=mutual
        )

    def _configuration(self, contents: Sequence[bytes]) -> grpc.ServerCertificateConfiguration:
        check_trusted(self._ca)
        check_pair(self._certificate, self._key)
        ca, certificate, key = contents
        return grpc.ssl_server_certificate_configuration([(key, certificate)], ca)


def expected_name(service: Service | None) -> list[tuple[str, str]]:
    """Return the options of a channel to a node: it must be that service, wherever it runs.

    Without a service its certificate must be that of the host that is dialled.
    """
    if service is None:
        return []
    return [("grpc.ssl_target_name_override", service_name(service))]


def check_bearer(value: str) -> str:
    """Return the token in the value of an authorization header; empty: there is none in it."""
    scheme, _, token = value.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""
