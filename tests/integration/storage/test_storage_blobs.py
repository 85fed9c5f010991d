"""Blobs through the client and real gRPC."""

import asyncio
import os
import random

import grpc.aio
import pytest

from phalanx.errors import (
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PhalanxError,
)
from phalanx.rpc.channel import open_channel
from phalanx.rpc.status import from_rpc_error
from phalanx.testing.storage_messages import digest_of
from phalanx.v1 import storage_service_pb2 as pb
from phalanx.v1 import storage_service_pb2_grpc as pb_grpc

MIB = 1024 * 1024


@pytest.fixture
async def stub(service):
    channel = open_channel(service.server.address)
    yield pb_grpc.StorageServiceStub(channel)
    await channel.close()


def content(size, seed=1):
    return random.Random(seed).randbytes(size)


@pytest.mark.parametrize("size", [0, 1, 64 * 1024, MIB - 1, MIB, MIB + 1, 5 * MIB + 3])
@pytest.mark.parametrize("check_first", [True, False])
async def test_round_trip(client, tmp_path, size, check_first):
    data = content(size)
    digest = await client.put_blob(data, check_first=check_first)
    assert digest == digest_of(data)
    assert await client.get_blob(digest) == data
    assert await client.get_blob_to(digest, tmp_path / "out") == size
    assert (tmp_path / "out").read_bytes() == data


async def one_by_one(chunks):
    for chunk in chunks:
        yield chunk


async def test_every_kind_of_source_gives_the_same_blob(client, tmp_path):
    data = content(3 * MIB + 17)
    path = tmp_path / "file"
    path.write_bytes(data)
    cuts = [data[:5], data[5 : MIB + 9], b"", data[MIB + 9 :]]
    sources = [
        data, bytearray(data), memoryview(data), path, cuts, tuple(cuts), iter(cuts),
        one_by_one(cuts),
    ]  # fmt: skip
    for source in sources:
        assert await client.put_blob(source) == digest_of(data)
    assert await client.get_blob(digest_of(data)) == data


async def test_what_is_stored_is_not_sent_again(client, service):
    data = content(MIB)
    await client.put_blob(data)
    label = ("put_blob", "embedded", "ok")
    before = puts(service, label)
    await client.put_blob(data)
    assert puts(service, label) == before
    await client.put_blob(content(MIB, 2))
    assert puts(service, label) == before + 1


def puts(service, label):
    name = "phalanx_storage_operation_seconds_count"
    labels = dict(zip(("operation", "backend", "outcome"), label, strict=True))
    return service.server.registry.get_sample_value(name, labels) or 0


async def test_parts_of_a_blob(client):
    digest = await client.put_blob(b"0123456789")
    assert await client.get_blob(digest, 2, 3) == b"234"
    assert await client.get_blob(digest, 7) == b"789"
    with pytest.raises(InvalidArgument, match="not all inside"):
        await client.get_blob(digest, 7, 4)


async def test_errors_have_a_code_and_a_reason(client, tmp_path):
    with pytest.raises(NotFound) as caught:
        await client.get_blob(digest_of(b"nowhere"))
    assert caught.value.reason == "BLOB_NOT_FOUND"
    with pytest.raises(InvalidArgument) as caught:
        await client.get_blob("../../etc/passwd")
    assert caught.value.violations[0].field == "digest"
    with pytest.raises(NotFound):
        await client.get_blob_to(digest_of(b"nowhere"), tmp_path / "out")
    assert os.listdir(tmp_path) == ["state"], "a partial file was left"
    with pytest.raises(FailedPrecondition) as caught:
        await client.get_blob_to(digest_of(b"nowhere"), tmp_path / "no" / "folder" / "out")
    assert caught.value.reason == "FILE_UNWRITABLE"
    with pytest.raises(InvalidArgument, match="cannot read"):
        await client.put_blob(tmp_path / "nowhere")
    with pytest.raises(InvalidArgument, match="no blob"):
        await client.put_blob(17)


async def test_a_wrong_digest_is_refused_and_leaves_nothing(client, stored_files):
    with pytest.raises(InvalidArgument) as caught:
        await client.put_blob(content(MIB), digest=digest_of(b"other"))
    assert caught.value.reason == "DIGEST_MISMATCH"
    assert stored_files() == ([], [])


async def test_a_damaged_blob_never_reaches_a_file(client, service, tmp_path):
    data = content(3 * MIB)
    digest = await client.put_blob(data)
    path = tmp_path / "state" / "blobs" / digest[:2] / digest
    damaged = bytearray(data)
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(DataLoss) as caught:
        await client.get_blob_to(digest, tmp_path / "out")
    assert caught.value.reason == "BLOB_CORRUPT"
    assert os.listdir(tmp_path) == ["state"]
    corruptions = "phalanx_storage_corruptions_total"
    assert service.server.registry.get_sample_value(corruptions) == 1
    assert await client.missing_blobs([digest]) == [digest]
    await client.put_blob(data)
    assert await client.get_blob(digest) == data


async def test_check_blobs(client):
    stored = [await client.put_blob(b"%d" % number) for number in range(3)]
    missing = [digest_of(b"x%d" % number) for number in range(20_000)]
    asked = [*missing[:7], *stored, *missing[7:]]
    assert await client.missing_blobs(asked) == missing
    assert await client.missing_blobs([]) == []


async def test_compose(client):
    first, second = content(2 * MIB, 1), content(MIB + 5, 2)
    one, two = await client.put_blob(first), await client.put_blob(second)
    pieces = [
        pb.BlobPiece(inline=b"header"),
        pb.BlobPiece(slice=pb.BlobSlice(digest=two, offset=5, length=MIB)),
        pb.BlobPiece(slice=pb.BlobSlice(digest=one)),
        pb.BlobPiece(inline=b""),
        pb.BlobPiece(slice=pb.BlobSlice(digest=two, offset=1, length=1)),
    ]
    expected = b"header" + second[5 : 5 + MIB] + first + second[1:2]
    composed = await client.compose_blob(pieces)
    assert composed == (digest_of(expected), len(expected))
    assert await client.get_blob(composed.digest) == expected
    assert await client.compose_blob(pieces) == composed


async def test_compose_refuses_what_it_cannot_do(client, tmp_path, stored_files):
    data = content(MIB)
    digest = await client.put_blob(data)

    async def compose(*pieces):
        await client.compose_blob(list(pieces))

    with pytest.raises(NotFound):
        await compose(pb.BlobPiece(slice=pb.BlobSlice(digest=digest_of(b"nowhere"))))
    with pytest.raises(InvalidArgument, match="not all inside"):
        await compose(pb.BlobPiece(slice=pb.BlobSlice(digest=digest, length=MIB + 1)))
    with pytest.raises(InvalidArgument, match=r"pieces\[1\]"):
        await compose(pb.BlobPiece(inline=b"x"), pb.BlobPiece())
    path = tmp_path / "state" / "blobs" / digest[:2] / digest
    damaged = bytearray(data)
    damaged[100] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(DataLoss):
        # The slice itself is whole; the blob that it is cut from is not.
        await compose(pb.BlobPiece(slice=pb.BlobSlice(digest=digest, offset=1000, length=10)))
    assert stored_files() == ([digest], [])


async def test_an_upload_that_is_cancelled_leaves_nothing(stub, stored_files, eventually):
    call = stub.PutBlob(timeout=60)
    await call.write(pb.PutBlobRequest(expected_bytes=10 * MIB))
    await call.write(pb.PutBlobRequest(chunk=content(MIB)))
    await eventually(lambda: stored_files()[1])
    call.cancel()
    await eventually(lambda: stored_files() == ([], []))


async def test_an_upload_that_breaks_off_early_is_refused(stub, stored_files):
    call = stub.PutBlob(timeout=60)
    await call.write(pb.PutBlobRequest(expected_bytes=10 * MIB, chunk=content(MIB)))
    await call.done_writing()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert from_rpc_error(caught.value).reason == "SIZE_MISMATCH"
    assert stored_files() == ([], [])


async def test_an_upload_without_a_message_is_refused(stub):
    call = stub.PutBlob(timeout=60)
    await call.done_writing()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert isinstance(from_rpc_error(caught.value), InvalidArgument)


async def test_an_idle_upload_is_ended(stub, stored_files, monkeypatch):
    monkeypatch.setattr("storage.service.blob_calls._IDLE_S", 0.05)
    call = stub.PutBlob(timeout=60)
    await call.write(pb.PutBlobRequest(chunk=b"x"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert from_rpc_error(caught.value).reason == "UPLOAD_IDLE"
    assert stored_files() == ([], [])


async def test_too_many_uploads_are_refused_and_the_others_go_on(stub, monkeypatch):
    monkeypatch.setattr("storage.service.blob_calls._UPLOADS", 2)
    monkeypatch.setattr("storage.service.blob_calls._PATIENCE_S", 60.0)
    calls = [stub.PutBlob(timeout=60) for _ in range(2)]
    for call in calls:
        await call.write(pb.PutBlobRequest(chunk=b"x"))

    async def refused():
        try:
            await stub.PutBlob(iter([pb.PutBlobRequest(chunk=b"y")]), timeout=60)
        except grpc.aio.AioRpcError as error:
            return from_rpc_error(error).reason
        return ""

    async with asyncio.timeout(30):
        while await refused() != "TOO_MANY_UPLOADS":
            await asyncio.sleep(0.01)
    for call in calls:
        await call.done_writing()
    assert {(await call).digest for call in calls} == {digest_of(b"x")}
    assert await refused() == ""


async def test_silent_uploads_make_room_for_others_the_longest_silent_first(
    stub, client, monkeypatch
):
    monkeypatch.setattr("storage.service.blob_calls._UPLOADS", 2)
    monkeypatch.setattr("storage.service.blob_calls._PATIENCE_S", 0.0)
    silent = [stub.PutBlob(timeout=60) for _ in range(2)]
    for call in silent:
        await call.write(pb.PutBlobRequest(chunk=b"x"))
        # The next one begins when this one is surely there and waited for.
        assert await client.get_blob(await client.put_blob(b"y")) == b"y"
    for number in range(5):
        await client.put_blob(b"z%d" % number)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await silent[0]
    assert from_rpc_error(caught.value).reason == "UPLOAD_IDLE"
    silent[1].cancel()


async def test_a_message_beyond_the_limit_harms_nobody(stub, client):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.PutBlob(iter([pb.PutBlobRequest(chunk=bytes(5 * MIB))]), timeout=60)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert await client.get_blob(await client.put_blob(b"content")) == b"content"


async def test_many_transfers_at_once(client):
    blobs = [content(200_000, seed) for seed in range(24)]
    digests = await asyncio.gather(*(client.put_blob(blob) for blob in blobs))
    assert await asyncio.gather(*(client.get_blob(digest) for digest in digests)) == blobs


async def test_a_reader_that_goes_away_frees_its_file(stub, client, service, eventually):
    digest = await client.put_blob(content(30 * MIB))

    def open_files():
        links = (f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd"))
        return [link for link in links if os.path.exists(link) and digest in os.readlink(link)]

    call = stub.GetBlob(pb.GetBlobRequest(digest=digest), timeout=60)
    await call.read()
    await eventually(open_files)
    call.cancel()
    await eventually(lambda: not open_files())


class Call:
    """An answer stream as gRPC's calls are."""

    def __init__(self, responses):
        self._responses = responses

    def __aiter__(self):
        return self._responses

    def cancel(self):
        pass


class BreakingStub:
    """Breaks the first downloads off in the middle, as a restarted storage would."""

    def __init__(self, stub, breaks):
        self._stub = stub
        self._breaks = breaks
        self.requests = []

    def GetBlob(self, request, timeout):
        self.requests.append((request.offset, request.length))
        return Call(self._responses(self._stub.GetBlob(request, timeout=timeout)))

    async def _responses(self, call):
        count = 0
        async for response in call:
            yield response
            count += 1
            if self._breaks and count == 2:
                self._breaks -= 1
                raise grpc.aio.AioRpcError(
                    grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), "broken"
                )


async def test_a_broken_download_goes_on_where_it_was(client, tmp_path):
    data = content(6 * MIB + 1)
    digest = await client.put_blob(data)
    transfers = client._blobs
    breaking = BreakingStub(transfers._stub, 2)
    transfers._stub = breaking
    assert await client.get_blob(digest) == data
    assert breaking.requests == [(0, 0), (2 * MIB, 4 * MIB + 1), (4 * MIB, 2 * MIB + 1)]
    breaking._breaks = 1
    assert await client.get_blob_to(digest, tmp_path / "out") == len(data)
    assert (tmp_path / "out").read_bytes() == data


async def test_a_download_that_stands_still_is_given_up(client):
    async def nothing():
        await asyncio.Event().wait()
        yield pb.GetBlobResponse()

    class Silent:
        def GetBlob(self, request, timeout):
            return Call(nothing())

    client._blobs._stub = Silent()
    client._blobs._timeout_s = 0.05
    with pytest.raises(PhalanxError) as caught:
        await client.get_blob(digest_of(b"x"))
    assert caught.value.reason == "DOWNLOAD_IDLE"
