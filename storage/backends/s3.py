"""S3-compatible object stores, through obstore; needs the extra ``s3``.

Credentials, region and endpoint come from the environment (``AWS_ACCESS_KEY_ID``,
``AWS_SECRET_ACCESS_KEY``, ``AWS_REGION``, ``AWS_ENDPOINT_URL``, …), from a web identity or from the
metadata service of the machine, as obstore finds them. Every upload carries checksums that the
store compares. Calls block, in the threads of whoever calls: obstore's asynchronous ones can abort
a process that ends.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import S3Store

from phalanx.errors import FailedPrecondition, Unavailable
from storage.interfaces import Buffer

if TYPE_CHECKING:
    from obstore.store import S3Config

PART_BYTES = 8 * 1024 * 1024
"""What is larger is uploaded in parts of this size; a writer has some of them in memory."""

_ENDPOINTS = ("AWS_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")
_OWNER_KEY = "phalanx-owner"
_PARTS_AT_ONCE = 2
_RETRIES = 5
_RETRY_S = 30.0
_REQUEST_TIMEOUT = "30s"
_CONNECT_TIMEOUT = "5s"


def open_s3(url: str) -> "S3Objects":
    """Return the objects below ``s3://BUCKET/PREFIX``; nothing is asked of the store yet."""
    config: S3Config = {}
    if "AWS_CHECKSUM_ALGORITHM" not in os.environ:
        config["checksum_algorithm"] = "SHA256"
    try:
        store = S3Store.from_url(
            url,
            config=config,
            client_options={
                "timeout": _REQUEST_TIMEOUT,
                "connect_timeout": _CONNECT_TIMEOUT,
                "allow_http": _is_plain(os.environ),
            },
            retry_config={"max_retries": _RETRIES, "retry_timeout": timedelta(seconds=_RETRY_S)},
        )
    except (BaseError, ValueError) as error:
        raise FailedPrecondition(
            f"cannot use the object store {url}: {error}", reason="STATE_UNUSABLE"
        ) from error
    return S3Objects(url, store)


class S3Objects:
    """An ObjectStore."""

    def __init__(self, name: str, store: S3Store) -> None:
        self.name = name
        self._store = store

    def writer(self, key: str) -> "S3Writer":
        """Begin an object."""
        return S3Writer(self._store, key)

    def read(self, key: str, offset: int, length: int) -> bytes | None:
        """Return a part of an object."""
        with _errors("read from"):
            try:
                return bytes(obstore.get_range(self._store, key, start=offset, length=length))
            except FileNotFoundError:
                return None

    def delete(self, keys: Sequence[str]) -> None:
        """Remove objects."""
        with _errors("removed from"), suppress(FileNotFoundError):
            obstore.delete(self._store, keys)

    def owner(self) -> str:
        """Return the token in the store."""
        with _errors("read from"):
            try:
                return bytes(obstore.get(self._store, _OWNER_KEY).bytes()).decode(
                    "ascii", "replace"
                )
            except FileNotFoundError:
                return ""

    def claim(self, token: str) -> str:
        """Leave a token by a conditional write, so that of two only one succeeds."""
        with _errors("stored in"):
            try:
                obstore.put(self._store, _OWNER_KEY, token.encode(), mode="create")
            except AlreadyExistsError:
                return self.owner()
        return token


class S3Writer:
    """An ObjectWriter."""

    def __init__(self, store: S3Store, key: str) -> None:
        self._store = store
        self._key = key
        self._size_bytes = 0
        self._is_over = False
        with _errors("stored in"):
            self._writer = obstore.open_writer(
                store, key, buffer_size=PART_BYTES, max_concurrency=_PARTS_AT_ONCE
            )

    def write(self, content: Buffer) -> None:
        """Take the next bytes."""
        self._size_bytes += len(content)
        with _errors("stored in"):
            self._writer.write(bytes(content))

    def close(self) -> None:
        """Make the object visible."""
        with _errors("stored in"):
            self._writer.close()
        self._is_over = True

    def abort(self) -> None:
        """Leave nothing behind.

        Parts that were sent can be had back only by making an object of them, which is removed. If
        the store does not answer, they are left to the rule of the bucket for parts without an end.
        """
        if self._is_over:
            return
        self._is_over = True
        if self._size_bytes < PART_BYTES:
            return
        with suppress(BaseError, OSError):
            self._writer.close()
            obstore.delete(self._store, self._key)


def _is_plain(environ: Mapping[str, str]) -> bool:
    """Whether the environment names an endpoint without TLS."""
    return any(environ.get(name, "").startswith("http://") for name in _ENDPOINTS)


@contextmanager
def _errors(what: str) -> Iterator[None]:
    try:
        yield
    except (BaseError, OSError) as error:
        raise Unavailable(
            f"a blob cannot be {what} the object store: {str(error).splitlines()[0]}; try again",
            reason="OBJECT_STORE_UNREACHABLE",
            retry_after_s=1.0,
        ) from error
