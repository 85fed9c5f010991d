"""Chunks of a data set on their way to storage while others are read."""

import hashlib
import threading
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest

from phalanx.data.links import LinkedFile, Links
from phalanx.data.manifest import ChunkInfo, DatasetManifest, Statistics
from phalanx.errors import Unavailable
from phalanx.sdk import silence
from phalanx.sdk.data import _UNDER_WAY_BYTES, DataSets, _Sink
from phalanx.sdk.silence import Silence
from phalanx.v1.dataset_service_pb2 import CreateDatasetResponse

GUARD_S = 30.0
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
    return _Sink(uploads, stored.append, Silence(None))


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


def test_whoever_waits_long_for_storage_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(silence, "SILENCE_S", 0.0)
    told = threading.Event()
    calls: list[None] = []

    class Silent(Future[str]):
        def result(self, timeout: float | None = None) -> str:
            # What a stopped service does, until the other side has said so.
            assert told.wait(GUARD_S)
            return "digest"

    class Stopped:
        def start_put_blob(self, _data: bytes, _digest: str) -> Future[str]:
            return Silent()

    def tell() -> None:
        calls.append(None)
        told.set()

    backend: Any = Stopped()
    with _Sink(backend, None, Silence(tell)) as sink:
        for _ in range(3):
            sink.put(CHUNK)
    assert calls == [None]


def test_linked_files_are_given_time_by_their_size() -> None:
    limits: list[float] = []

    class Registers:
        def put_blob(self, data: bytes) -> str:
            return hashlib.sha256(data).hexdigest()

        def call(self, _method: Any, _request: Any, *, more_s: float) -> Any:
            limits.append(more_s)
            return CreateDatasetResponse()

    backend: Any = Registers()
    chunks = tuple(ChunkInfo(f"{index:064}", 1000, 9000) for index in range(100))
    copied = DatasetManifest(
        "dense", "float32", 1, "regression", "y", {"train": chunks}, Statistics(100_000)
    )
    DataSets(backend, "default").register("a", copied)
    for count in (1, 1000):
        size_bytes = 10**9 // count
        files = tuple(
            LinkedFile(f"/d/{n}", size_bytes, 100_000 // count, "0" * 64) for n in range(count)
        )
        ranges = {"train": tuple((each * 1000, each * 1000 + 1000) for each in range(100))}
        linked = replace(copied, links=Links(files, ranges, {}))
        DataSets(backend, "default").register("a", linked)
    none, one, many = limits
    assert none == 0.0
    # A hundredth of 1 GB is decoded for the first chunk, and each file is opened.
    assert one == pytest.approx(0.5 + 0.05 + 2.5)
    assert many == pytest.approx(500 + 0.05 + 2.5)


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
