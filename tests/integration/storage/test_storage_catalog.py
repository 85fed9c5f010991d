"""Data sets and models through real gRPC, with manifests that ingestion made."""

import asyncio

import numpy as np
import pytest

from phalanx.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from phalanx.rpc.channel import open_channel
from phalanx.testing.datasets import classification, store
from phalanx.testing.storage_messages import digest_of, model
from phalanx.v1 import dataset_service_pb2 as dataset_pb
from phalanx.v1 import dataset_service_pb2_grpc as dataset_grpc
from phalanx.v1 import storage_service_pb2 as pb


@pytest.fixture
async def added(client, tmp_path):
    """Stores a real data set and returns what registers it again and again."""
    stored = await asyncio.to_thread(store, tmp_path / "data", *classification(), test=0.2)
    for digest in stored.manifest.digests():
        await client.put_blob(stored.fetch(digest))
    manifest_digest = await client.put_blob(stored.manifest.to_json())
    return stored.manifest, manifest_digest


async def test_a_data_set_is_described_by_its_manifest(client, added):
    manifest, manifest_digest = added
    dataset = await client.create_dataset("clouds", manifest_digest)
    assert (dataset.namespace, dataset.name, dataset.version) == ("default", "clouds", 1)
    assert dict(dataset.rows) == manifest.rows_by_split()
    assert dataset.rows["test"] > 0
    assert dataset.features == 8
    assert dataset.task == "classification"
    assert tuple(dataset.classes) == manifest.classes
    assert dataset.format == "dense"
    assert dataset.size_bytes == manifest.size_bytes
    assert dataset.target == manifest.target
    assert dataset.HasField("create_time")
    assert await client.get_dataset("clouds") == dataset
    assert await client.get_dataset("clouds@1") == dataset
    assert await client.list_datasets() == [dataset]
    chunk = await client.get_blob(manifest.digests()[0])
    assert len(chunk) == manifest.splits["train"][0].size_bytes


async def test_its_chunks_are_no_garbage_until_it_is_deleted(client, added):
    manifest, manifest_digest = added
    await client.create_dataset("clouds", manifest_digest)
    await client.collect_garbage(grace_s=0)
    assert await client.missing_blobs(manifest.digests()) == []
    await client.set_pins("job-1", [pb.Pin(dataset=pb.PinnedVersion(name="clouds", version=1))])
    with pytest.raises(FailedPrecondition) as caught:
        await client.delete_dataset("clouds")
    assert caught.value.reason == "IN_USE"
    await client.set_pins("job-1", [])
    await client.delete_dataset("clouds")
    await client.collect_garbage(grace_s=0)
    assert await client.missing_blobs(manifest.digests()) == list(manifest.digests())


async def test_request_ids(client, added):
    _, manifest_digest = added
    first = await client.create_dataset("clouds", manifest_digest, request_id="r-1")
    assert await client.create_dataset("clouds", manifest_digest, request_id="r-1") == first
    with pytest.raises(AlreadyExists):
        await client.create_dataset("others", manifest_digest, request_id="r-1")


async def test_what_is_no_manifest_is_refused(client, service):
    other = await client.put_blob(b"no manifest")
    with pytest.raises(InvalidArgument) as caught:
        await client.create_dataset("clouds", other)
    assert caught.value.violations[0].field == "manifest_digest"
    with pytest.raises(NotFound):
        await client.create_dataset("clouds", digest_of(b"nowhere"))
    corruptions = "phalanx_storage_corruptions_total"
    assert service.server.registry.get_sample_value(corruptions) == 0


async def test_missing_chunks_are_named(client, added):
    manifest, _ = added
    await client.collect_garbage(grace_s=0)
    manifest_digest = await client.put_blob(manifest.to_json())
    with pytest.raises(FailedPrecondition) as caught:
        await client.create_dataset("clouds", manifest_digest)
    assert caught.value.reason == "BLOB_MISSING"


async def test_pages_over_the_wire(service, client, added):
    _, manifest_digest = added
    for name in "cab":
        await client.create_dataset(name, manifest_digest)
    channel = open_channel(service.server.address)
    stub = dataset_grpc.DatasetServiceStub(channel)
    request = dataset_pb.ListDatasetsRequest(page_size=2)
    first = await stub.ListDatasets(request, timeout=30)
    assert [dataset.name for dataset in first.datasets] == ["a", "b"]
    request.page_token = first.next_page_token
    second = await stub.ListDatasets(request, timeout=30)
    assert [dataset.name for dataset in second.datasets] == ["c"]
    assert second.next_page_token == ""
    await channel.close()


async def test_models(client):
    weights = np.arange(10, dtype=np.float32).tobytes()
    await client.put_blob(weights)
    await client.put_blob(b"{}")
    wanted = model("fashion", model=b"{}", weights=weights)
    created = await client.create_model(wanted, request_id="job-1")
    assert created.version == 1
    assert await client.create_model(wanted, request_id="job-1") == created
    assert (await client.create_model(wanted)).version == 2
    assert [(m.name, m.version) for m in await client.list_models()] == [
        ("fashion", 2),
        ("fashion", 1),
    ]
    assert await client.get_model("fashion@1") == created
    await client.delete_model("fashion")
    with pytest.raises(NotFound):
        await client.get_model("fashion")
