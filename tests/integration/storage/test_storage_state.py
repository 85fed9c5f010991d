"""Journals, leases, terms, checkpoints and housekeeping through the client and real gRPC."""

import asyncio

import grpc.aio
import pytest

from phalanx.clients.storage import StorageClient, SyncStorageClient
from phalanx.errors import (
    Aborted,
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unavailable,
)
from phalanx.testing.storage_messages import digest_of, part
from phalanx.v1 import storage_service_pb2 as pb


async def payloads(client, stream, *arguments):
    return [record.payload async for record in client.read_journal(stream, *arguments)]


async def test_journals(client):
    assert await client.append_journal("control", [b"a", b"b"], expected_sequence=0) == 2
    assert await client.append_journal("control", [b"c"]) == 3
    assert await payloads(client, "control") == [b"a", b"b", b"c"]
    assert await payloads(client, "control", 1, 1) == [b"b"]
    assert await client.journal_end("control") == 3
    assert await client.journal_end("nothing") == 0
    with pytest.raises(Aborted) as caught:
        await client.append_journal("control", [b"x"], expected_sequence=2)
    assert caught.value.details == {"next_sequence": "3"}
    await client.truncate_journal("control", 2)
    assert await payloads(client, "control") == [b"c"]
    await client.delete_journal("control")
    assert await payloads(client, "control") == []


async def test_a_long_journal_is_read_page_by_page(client):
    for start in range(0, 25_000, 5000):
        await client.append_journal("events", [b"%d" % (start + i) for i in range(5000)])
    assert await payloads(client, "events") == [b"%d" % i for i in range(25_000)]
    assert len(await payloads(client, "events", 3, 12_345)) == 12_345
    assert await payloads(client, "events", 24_999, 5) == [b"24999"]


async def test_a_journal_truncated_between_two_pages_is_told(client):
    for _ in range(3):
        await client.append_journal("events", [b"x"] * 5000)
    records = client.read_journal("events")
    await anext(records)
    await client.truncate_journal("events", 12_000)
    with pytest.raises(Aborted) as caught:
        [record async for record in records]
    assert caught.value.reason == "JOURNAL_TRUNCATED"


async def test_appends_that_fit_no_message_are_refused_before_they_are_sent(client):
    with pytest.raises(InvalidArgument) as caught:
        await client.append_journal("control", [bytes(1_000_000)] * 5)
    assert caught.value.reason == "APPEND_TOO_LARGE"


class LosingAnswers:
    """Carries out a call and loses its answer, as often as told."""

    def __init__(self, method, losses):
        self._method = method
        self.losses = losses
        self.calls = 0

    async def __call__(self, request, *, timeout):
        self.calls += 1
        response = await self._method(request, timeout=timeout)
        if self.losses:
            self.losses -= 1
            raise grpc.aio.AioRpcError(
                grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), "lost"
            )
        return response


async def test_a_compared_append_whose_answer_was_lost_is_not_done_twice(client):
    await client.append_journal("control", [b"a"])
    losing = client._storage.AppendJournal = LosingAnswers(client._storage.AppendJournal, 1)
    assert await client.append_journal("control", [b"b", b"c"], expected_sequence=1) == 3
    assert losing.calls == 2
    assert await payloads(client, "control") == [b"a", b"b", b"c"]


async def test_an_append_that_another_one_won_is_not_taken_for_a_lost_answer(client):
    real = client._storage.AppendJournal

    class Lost:
        calls = 0

        async def __call__(self, request, *, timeout):
            self.calls += 1
            if self.calls == 1:
                await real(pb.AppendJournalRequest(stream="control", records=[b"x"]), timeout=9)
                raise grpc.aio.AioRpcError(
                    grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), "lost"
                )
            return await real(request, timeout=timeout)

    client._storage.AppendJournal = Lost()
    with pytest.raises(Aborted) as caught:
        await client.append_journal("control", [b"mine"], expected_sequence=0)
    assert caught.value.reason == "SEQUENCE_MISMATCH"


async def test_an_append_without_a_place_is_not_retried(client):
    losing = client._storage.AppendJournal = LosingAnswers(client._storage.AppendJournal, 1)
    with pytest.raises(Unavailable):
        await client.append_journal("logs/job", [b"line"])
    assert losing.calls == 1


async def test_a_raised_term_whose_answer_was_lost(client):
    lease = (await client.acquire_lease("leader", "one")).lease
    fence = pb.Fence(lease="leader", token=lease.token)
    client._storage.RaiseTerm = LosingAnswers(client._storage.RaiseTerm, 1)
    assert await client.raise_term("job-1", 0, fence=fence) == 1
    client._storage.RaiseTerm.losses = 1
    with pytest.raises(Aborted):
        # Without a fence, somebody else may have raised it.
        await client.raise_term("job-1", 1)
    assert (await client.get_job_row("job-1")).term == 2


async def test_leadership_changes_hands(client):
    first = await client.acquire_lease("leader", "one")
    assert first.acquired
    watched = await client.get_lease("leader")
    second = await client.acquire_lease("leader", "two", seen=watched)
    assert second.acquired
    fence = pb.Fence(lease="leader", token=first.lease.token)
    with pytest.raises(Aborted) as caught:
        await client.append_journal("control", [b"late"], fence=fence)
    assert caught.value.reason == "STALE_GENERATION"
    with pytest.raises(Aborted):
        await client.renew_lease(first.lease)
    renewed = await client.renew_lease(second.lease)
    assert renewed.counter == second.lease.counter + 1
    await client.release_lease(renewed)
    assert (await client.get_lease("leader")).holder == ""
    assert await client.get_lease("other") is None


async def test_a_job_from_first_term_to_success(client):
    assert await client.get_job_row("job-1") is None
    assert await client.raise_term("job-1", 0) == 1
    for index in range(3):
        content = b"range %d" % index
        await client.put_blob(content, check_first=False)
        answer = await client.commit_checkpoint(part(content, index=index, ranges=3, final=True))
    assert answer.complete
    assert (await client.get_job_row("job-1")).final_checkpoint == answer.manifest
    assert await client.list_checkpoints("job-1") == [answer.manifest]
    with pytest.raises(FailedPrecondition) as caught:
        await client.raise_term("job-1", 1)
    assert caught.value.reason == "FINAL_CHECKPOINT"
    await client.delete_job_row("job-1")
    assert await client.get_job_row("job-1") is None


async def test_a_corrupt_checkpoint_is_found_and_the_one_before_it_is_there(client, tmp_path):
    await client.raise_term("job-1", 0)
    for step in (10, 20):
        content = b"parameters of %d" % step * 1000
        await client.put_blob(content)
        await client.commit_checkpoint(part(content, step=step))
    newest, before = await client.list_checkpoints("job-1")
    digest = newest.parts[0].digest
    path = tmp_path / "state" / "blobs" / digest[:2] / digest
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(DataLoss):
        await client.get_blob(digest)
    assert digest_of(await client.get_blob(before.parts[0].digest)) == before.parts[0].digest


async def test_garbage_collection(client):
    kept, garbage = await client.put_blob(b"kept"), await client.put_blob(b"garbage")
    await client.set_pins("job-1", [pb.Pin(blob=kept)])
    answer = await client.collect_garbage()
    assert (answer.blobs_removed, answer.blobs_kept) == (0, 2), "all are young"
    answer = await client.collect_garbage(dry_run=True, grace_s=0)
    assert (answer.blobs_removed, answer.bytes_removed) == (1, 7)
    assert await client.missing_blobs([kept, garbage]) == []
    answer = await client.collect_garbage(grace_s=0)
    assert (answer.blobs_removed, answer.bytes_removed, answer.blobs_kept) == (1, 7, 1)
    assert await client.missing_blobs([kept, garbage]) == [garbage]
    with pytest.raises(InvalidArgument):
        await client.collect_garbage(grace_s=-2)


async def test_two_collections_at_once(client):
    for number in range(50):
        await client.put_blob(b"%d" % number)
    answers = await asyncio.gather(*(client.collect_garbage(grace_s=0) for _ in range(3)))
    assert sum(answer.blobs_removed for answer in answers) == 50


async def test_usage_is_shown(client, service):
    await client.put_blob(bytes(1000))
    await service.collector.show_usage()
    value = service.server.registry.get_sample_value
    assert value("phalanx_storage_bytes", {"kind": "blobs"}) == 1000
    assert value("phalanx_storage_bytes", {"kind": "metadata"}) > 0


async def test_appends_from_many_clients_at_once(service):
    clients = [StorageClient(service.server.address, own_connection=True) for _ in range(4)]

    async def write(client, number):
        for index in range(25):
            await client.append_journal("events", [b"%d:%d" % (number, index)])

    await asyncio.gather(*(write(client, number) for number, client in enumerate(clients)))
    found = await payloads(clients[0], "events")
    assert sorted(found) == sorted(b"%d:%d" % (n, i) for n in range(4) for i in range(25))
    for number in range(4):
        own = [payload for payload in found if payload.startswith(b"%d:" % number)]
        assert own == [b"%d:%d" % (number, index) for index in range(25)], "order of one writer"
    for client in clients:
        await client.close()


async def test_the_blocking_client_does_the_same(service, tmp_path):
    def use(address):
        with SyncStorageClient(address) as client:
            digest = client.put_blob([b"con", b"tent"])
            assert client.get_blob(digest) == b"content"
            assert client.get_blob(digest, 3, 2) == b"te"
            assert client.get_blob_to(digest, tmp_path / "out") == 7
            assert client.missing_blobs([digest]) == []
            piece = pb.BlobPiece(slice=pb.BlobSlice(digest=digest, length=3))
            assert client.compose_blob([piece]).size_bytes == 3
            assert client.append_journal("events", [b"a"], expected_sequence=0) == 1
            assert [record.payload for record in client.read_journal("events")] == [b"a"]
            assert client.get_job_row("job") is None
            assert client.list_checkpoints("job") == []
            assert client.list_datasets() == []
            assert client.list_models() == []
            assert client.collect_garbage(dry_run=True).blobs_kept == 2
            with pytest.raises(NotFound):
                client.get_model("m")
        with pytest.raises(FailedPrecondition):
            client.get_blob(digest)
        client.close()

    await asyncio.to_thread(use, service.server.address)


async def test_nobody_at_the_address(free_port):
    client = StorageClient(f"127.0.0.1:{free_port}", timeout_s=2, attempts=2)
    with pytest.raises(Unavailable):
        await client.get_lease("leader")
    with pytest.raises(Unavailable):
        await client.put_blob(b"x")
    await client.close()
