"""What stands behind a ``Cluster``: a remote cluster's services, or the same calls answered in this
process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from phalanx.addresses import split_address, split_addresses
from phalanx.rpc.credentials import ClientKeys
from phalanx.sdk.methods import (
    GET_CLUSTER,
    STORAGE_SERVICES,
    Method,
    RequestT,
    ResponseT,
)
from phalanx.sdk.transport import CALL_TIMEOUT_S, STREAM_TIMEOUT_S, Transport
from phalanx.v1.cluster_service_pb2 import GetClusterRequest

if TYPE_CHECKING:
    from concurrent.futures import Future

    from phalanx.clients.storage import SyncStorageClient

_ANY_HOST = frozenset({"", "0.0.0.0", "[::]", "::"})  # noqa: S104 - compared, not bound
_HINT = "start one with `phalanx up`, or name another with --address or PHALANX_ADDRESS"


class Backend(Protocol):
    """The public services, called with their own messages. Every method raises PhalanxError."""

    @property
    def address(self) -> str:
        """Where it is, for messages to people."""

    def call(
        self,
        method: Method[RequestT, ResponseT],
        request: RequestT,
        *,
        timeout_s: float | None = None,
        more_s: float = 0.0,
        accept: Callable[[ResponseT], bool] | None = None,
    ) -> ResponseT:
        """Make a unary call; an answer that `accept` refuses is asked for again elsewhere.

        ``more_s`` is what it may take beyond the time that any call may.
        """

    def stream(
        self,
        method: Method[RequestT, ResponseT],
        request: RequestT,
        *,
        timeout_s: float = STREAM_TIMEOUT_S,
        accept: Callable[[ResponseT], bool] | None = None,
    ) -> Iterator[ResponseT]:
        """Make one call that answers with a stream, which ends where `accept` refuses a message."""

    def put_blob(self, data: bytes) -> str:
        """Store bytes durably; return their digest."""

    def start_put_blob(self, data: bytes, digest: str) -> Future[str]:
        """Begin to store bytes of this digest; its result is awaited by the caller."""

    def get_blob(self, digest: str) -> bytes:
        """Return a stored blob, checked against its digest."""

    def get_blob_to(self, digest: str, path: Path) -> None:
        """Write a stored blob, checked against its digest, to a file."""

    def close(self) -> None:
        """Give up connections and what else it holds."""


class RemoteBackend:
    """The services of a running cluster."""

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        timeout_s: float = CALL_TIMEOUT_S,
        keys: ClientKeys | None = None,
    ) -> None:
        self._control = Transport(addresses, hint=_HINT, timeout_s=timeout_s, keys=keys)
        self._storage: Transport | None = None
        self._blobs: SyncStorageClient | None = None

    @property
    def address(self) -> str:
        """The address that answered last."""
        return self._control.address

    def call(
        self,
        method: Method[RequestT, ResponseT],
        request: RequestT,
        *,
        timeout_s: float | None = None,
        more_s: float = 0.0,
        accept: Callable[[ResponseT], bool] | None = None,
    ) -> ResponseT:
        """Make a unary call, with fail-over and retries."""
        return self._transport(method).call(
            method, request, timeout_s=timeout_s, more_s=more_s, accept=accept
        )

    def stream(
        self,
        method: Method[RequestT, ResponseT],
        request: RequestT,
        *,
        timeout_s: float = STREAM_TIMEOUT_S,
        accept: Callable[[ResponseT], bool] | None = None,
    ) -> Iterator[ResponseT]:
        """Make one call that answers with a stream."""
        return self._transport(method).stream(method, request, timeout_s=timeout_s, accept=accept)

    def put_blob(self, data: bytes) -> str:
        """Store bytes durably; return their digest."""
        return self._blob_client().put_blob(data)

    def start_put_blob(self, data: bytes, digest: str) -> Future[str]:
        """Begin to store bytes of this digest."""
        return self._blob_client().start_put_blob(data, digest=digest)

    def get_blob(self, digest: str) -> bytes:
        """Return a stored blob, checked against its digest."""
        return self._blob_client().get_blob(digest)

    def get_blob_to(self, digest: str, path: Path) -> None:
        """Write a stored blob, checked against its digest, to a file."""
        self._blob_client().get_blob_to(digest, path)

    def close(self) -> None:
        """Close all connections."""
        self._control.close()
        if self._storage is not None:
            self._storage.close()
        if self._blobs is not None:
            self._blobs.close()

    def _transport(self, method: Method[RequestT, ResponseT]) -> Transport:
        return self._storage_transport() if method.service in STORAGE_SERVICES else self._control

    def _storage_transport(self) -> Transport:
        if self._storage is None:
            answer = self._control.call(GET_CLUSTER, GetClusterRequest())
            self._storage = Transport(
                [
                    reachable_address(each, self._control.address)
                    for each in split_addresses(answer.storage_address)
                ],
                what="the storage service",
                hint="`phalanx status` shows which services are up",
                timeout_s=self._control.timeout_s,
                keys=self._control.keys,
            )
        return self._storage

    def _blob_client(self) -> SyncStorageClient:
        if self._blobs is None:
            from phalanx.clients.storage import SyncStorageClient

            self._blobs = SyncStorageClient(
                ",".join(self._storage_transport().addresses), keys=self._control.keys
            )
        return self._blobs


def reachable_address(advertised: str, dialled: str) -> str:
    """Return where clients reach storage: an advertised address without a host means the host they
    dialled.

    >>> reachable_address("0.0.0.0:7420", "train.example:7410")
    'train.example:7420'
    """
    host, _, port = advertised.rpartition(":")
    if host not in _ANY_HOST:
        return advertised
    dialled_host = split_address(dialled)[0]
    if ":" in dialled_host:
        dialled_host = f"[{dialled_host}]"
    return f"{dialled_host}:{port}"
