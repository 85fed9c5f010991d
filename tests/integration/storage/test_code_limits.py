"""What people keep as code, for good, is bounded."""

import json

import pytest

from phalanx.errors import InvalidArgument, NotFound, ResourceExhausted
from phalanx.testing.storage_messages import digest_of
from phalanx.v1 import storage_service_pb2 as pb
from phalanx.wheels import STREAM
from storage.service import code_limits
from storage.service.code_limits import CodeLimits

A, B, C = (name * 40 for name in (b"a", b"b", b"c"))


def record(content, **more):
    wheel = {"file_name": "w-1-py3-none-any.whl", "sha256": digest_of(content)}
    return json.dumps({**wheel, "size_bytes": len(content), **more}).encode()


@pytest.fixture
def limited(service):
    """The storage service, where all wheels may have 100 bytes, and one 60."""
    service._storage._code = CodeLimits(service.backend, 100)
    return service


@pytest.fixture(autouse=True)
def small_wheels(monkeypatch):
    monkeypatch.setattr(code_limits, "WHEEL_LIMIT_BYTES", 60)


async def test_records_and_pins_of_wheels_count_once_and_together(limited, client):
    for content in (A, B, C, b"x" * 61):
        await client.put_blob(content)
    await client.set_pins("code.a", [pb.Pin(blob=digest_of(A))])
    assert await client.append_journal(STREAM, [record(A)]) == 1
    assert await client.append_journal(STREAM, [record(B)]) == 2
    with pytest.raises(ResourceExhausted, match="there are 2 of 80 bytes, and this needs 40") as no:
        await client.append_journal(STREAM, [record(C)])
    assert no.value.reason == "QUOTA_EXCEEDED"
    assert no.value.details == {"quota": "code_bytes", "limit": "100", "used": "80"}
    with pytest.raises(ResourceExhausted):
        await client.set_pins("code.c", [pb.Pin(blob=digest_of(C))])
    # What jobs pin is bounded by their own lives.
    await client.set_pins("job-1", [pb.Pin(blob=digest_of(C))])
    # The same again is no news, and nothing has to be let go of a full store.
    assert await client.append_journal(STREAM, [record(A)]) == 2
    await client.set_pins("code.a", [])
    with pytest.raises(ResourceExhausted) as large:
        await client.set_pins("code.x", [pb.Pin(blob=digest_of(b"x" * 61))])
    assert large.value.reason == "WHEEL_TOO_LARGE"


async def test_there_are_only_so_many_wheels(limited, client, monkeypatch):
    monkeypatch.setattr(code_limits, "WHEELS_MAX", 1)
    for content in (b"a", b"b"):
        await client.put_blob(content)
    await client.append_journal(STREAM, [record(b"a")])
    with pytest.raises(ResourceExhausted, match="and be 1; there are 1 of 1 bytes"):
        await client.append_journal(STREAM, [record(b"b")])


@pytest.mark.parametrize(
    "wrong",
    [
        b"",
        b"[]",
        b"nonsense",
        digest_of(A).encode(),
        record(A, sha256="ab"),
        record(A, file_name=digest_of(B)),
        record(A, file_name="w" * 5000),
    ],
)
async def test_a_record_that_is_none_of_one_wheel_is_refused(limited, client, wrong):
    await client.put_blob(A)
    with pytest.raises(InvalidArgument, match="one digest"):
        await client.append_journal(STREAM, [wrong])


async def test_a_wheel_that_is_not_stored_is_not_listed(limited, client):
    with pytest.raises(NotFound):
        await client.append_journal(STREAM, [record(A)])
    await client.append_journal("other", [b"whatever"])
