"""Chunks of a data set on their way to storage while others are read."""

import hashlib
from concurrent.futures import Future
from typing import Any

import pytest

from phalanx.errors import Unavailable
from phalanx.sdk.data import _UNDER_WAY_BYTES, _Sink

CHUNK = bytes(_UNDER_WAY_BYTES // 4)


class Uploads:
    """A backend whose uploads end when they are told to, or when somebody waits for them."""

    def __init__(self) -> None:
        self.begun: list[Future[str]] = []
        self.error: Exception | None = None

    def start_put_blob(self, data: bytes, digest: str) -> Future[str]:
        assert hashlib.sha256(data).hexdigest() == digest
        upload = _Awaited(digest, self)
        self.begun.append(upload)
        return upload


class _Awaited(Future[str]):
    def __init__(self, digest: str, uploads: Uploads) -> None:
        super().__init__()
        self._digest = digest
        self._uploads = uploads

    def result(self, timeout: float | None = None) -> str:
        if self._uploads.error is not None:
            raise self._uploads.error
        self.set_result(self._digest)
        return super().result(timeout)


@pytest.fixture
def uploads() -> Uploads:
    return Uploads()


def sink_of(uploads: Any, stored: list[int]) -> _Sink:
    return _Sink(uploads, stored.append)


def test_a_bounded_number_of_bytes_is_on_its_way(uploads: Uploads) -> None:
    stored: list[int] = []
    with sink_of(uploads, stored) as sink:
        for number in range(10):
            assert sink.put(CHUNK) == hashlib.sha256(CHUNK).hexdigest()
            assert sum(not upload.done() for upload in uploads.begun) == min(number + 1, 4)
        assert stored == [len(CHUNK)] * 6
        sink.put(bytes(5 * len(CHUNK)))
        assert [upload.done() for upload in uploads.begun] == [True] * 10 + [False]
    assert all(upload.done() for upload in uploads.begun)
    assert stored == [len(CHUNK)] * 10 + [5 * len(CHUNK)]


def test_an_upload_that_fails_is_told_and_the_others_are_given_up(uploads: Uploads) -> None:
    stored: list[int] = []
    with pytest.raises(Unavailable), sink_of(uploads, stored) as sink:
        sink.put(CHUNK)
        sink.put(CHUNK)
        uploads.error = Unavailable("no storage")
    assert not stored
    assert uploads.begun[1].cancelled()


def test_nobody_waits_for_uploads_of_data_that_turned_out_wrong(uploads: Uploads) -> None:
    stored: list[int] = []

    def add() -> None:
        with sink_of(uploads, stored) as sink:
            sink.put(CHUNK)
            raise ValueError("line 7")

    with pytest.raises(ValueError, match="line 7"):
        add()
    assert not stored
    assert uploads.begun[0].cancelled()
