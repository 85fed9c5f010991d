"""The frame codec writes what protobuf writes and reads what protobuf reads."""

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from phalanx import frames
from phalanx.errors import InvalidArgument
from phalanx.v1 import aggregation_service_pb2 as pb
from phalanx.v1 import training_pb2

SIZES = [0, 1, 127, 128, 129, 16_383, 16_384, 2_097_151, 2_097_152, frames.PAYLOAD_LIMIT_BYTES]


def contribution(mask: bytes = b"") -> pb.ExchangeRequestHeader:
    return pb.ExchangeRequestHeader(
        frame=pb.ContributionFrame(
            term=3,
            step=1 << 40,
            range=2,
            node=training_pb2.TreeNode(first=4, span=4),
            vector="gradient",
            first_element=65_536,
            element_count=7,
            shard_mask=mask,
            example_count=99,
            loss_sum=-0.1,
        )
    )


@pytest.mark.parametrize("size", SIZES)
def test_request_bytes_equal_protobuf(size: int) -> None:
    payload = bytes(range(256)) * (size // 256) + bytes(size % 256)
    header = contribution()
    data = frames.encode_request(header, payload)
    assert data == pb.ExchangeRequest(header=header, payload=payload).SerializeToString()
    decoded, view = frames.decode_request(data)
    assert decoded == header
    assert view == payload


@pytest.mark.parametrize("size", SIZES)
def test_response_bytes_equal_protobuf(size: int) -> None:
    payload = bytes(size)
    header = pb.ExchangeResponseHeader(frame=pb.VersionFrame(term=1, version=9, element_count=3))
    data = frames.encode_response(header, payload)
    assert data == pb.ExchangeResponse(header=header, payload=payload).SerializeToString()
    decoded, view = frames.decode_response(data)
    assert decoded == header
    assert view == payload


def test_long_header_keeps_its_length() -> None:
    header = contribution(mask=bytes(70_000))
    data = frames.encode_request(header, b"x")
    assert data == pb.ExchangeRequest(header=header, payload=b"x").SerializeToString()
    assert frames.decode_request(data)[0] == header


def test_numpy_payload_is_encoded_in_raw_bytes_and_decoded_without_a_copy() -> None:
    vector = np.arange(1000, dtype=np.float32)
    data = frames.encode_request(contribution(), vector.data)
    _, view = frames.decode_request(data)
    assert view.obj is data
    assert np.array_equal(np.frombuffer(view, dtype="<f4"), vector)


def test_no_payload_and_empty_payload_are_the_same_bytes() -> None:
    assert frames.encode_request(contribution()) == frames.encode_request(contribution(), b"")


def test_foreign_layouts_are_read_as_protobuf_reads_them() -> None:
    header = contribution()
    canonical = frames.encode_request(header, b"payload")
    header_part, payload_part = canonical[: -len(b"payload") - 2], canonical[-len(b"payload") - 2 :]
    unknown_field = b"\x78\x01"
    for data in (
        payload_part + header_part,
        canonical + unknown_field,
        unknown_field + canonical,
        header_part + b"\x12\x02no" + payload_part,
        b"\x0a\x82\x80\x80\x80\x00\x78\x00" + payload_part,
    ):
        expected = pb.ExchangeRequest.FromString(data)
        decoded, view = frames.decode_request(data)
        assert decoded == expected.header
        assert view == expected.payload


@pytest.mark.parametrize("size", [0, 1, 130, 70_000])
@pytest.mark.parametrize("reason", ["", "R" * 200])
def test_a_joined_go_record_makes_the_bytes_of_protobuf(size: int, reason: str) -> None:
    go = training_pb2.GoRecord(term=1, version=9, action=2, loss_sum=0.5, reason=reason)
    header = pb.ExchangeResponseHeader(frame=pb.VersionFrame(term=1, version=9, element_count=3))
    message = frames.encode_response(header, bytes(size))
    joined = frames.join_go_record(message, go.SerializeToString())
    header.joined_go_record.CopyFrom(go)
    assert joined == pb.ExchangeResponse(header=header, payload=bytes(size)).SerializeToString()
    decoded, view = frames.decode_response(joined)
    assert (decoded, len(view)) == (header, size)


@pytest.mark.parametrize(
    "data",
    [
        b"\x0a",
        b"\x0a\x05abc",
        b"\x0a\x02\xff\xff",
        b"\x0a\x00\x12\x05ab",
        b"\x0a\xff\xff\xff\xff\xff\xff",
        b"\xff" * 20,
    ],
)
def test_malformed_message_is_an_invalid_argument(data: bytes) -> None:
    with pytest.raises(InvalidArgument, match="not valid protobuf"):
        frames.decode_request(data)
    with pytest.raises(InvalidArgument, match="not valid protobuf"):
        frames.decode_response(data)


@given(st.binary(max_size=200))
def test_any_bytes_either_parse_like_protobuf_or_are_refused(data: bytes) -> None:
    try:
        expected = pb.ExchangeRequest.FromString(data)
    except DecodeError:
        with pytest.raises(InvalidArgument):
            frames.decode_request(data)
        return
    header, payload = frames.decode_request(data)
    assert (header, bytes(payload)) == (expected.header, expected.payload)


@given(st.integers(0, 5_000_000), st.sampled_from([1, 4, 8]), st.integers(1, 8 << 20))
def test_frame_grid_covers_the_range_in_whole_blocks(count: int, itemsize: int, size: int) -> None:
    grid = frames.frame_grid(count, itemsize, size)
    position = 0
    for first, length in grid:
        assert first == position
        assert first % frames.BLOCK_ELEMENTS == 0
        assert 0 < length * itemsize <= frames.PAYLOAD_LIMIT_BYTES
        position += length
    assert position == count


def test_frame_grid_refuses_what_cannot_fit() -> None:
    with pytest.raises(InvalidArgument):
        frames.frame_grid(-1, 4)
    with pytest.raises(InvalidArgument):
        frames.frame_grid(10, 64)


@given(st.integers(1, 3_000_000), st.integers(1, 12))
def test_ranges_cover_the_vector_on_block_boundaries(count: int, ranges: int) -> None:
    blocks = -(-count // frames.BLOCK_ELEMENTS)
    if ranges > blocks:
        with pytest.raises(InvalidArgument, match="cannot be split"):
            frames.split_ranges(count, ranges)
        return
    pieces = frames.split_ranges(count, ranges)
    assert len(pieces) == ranges
    position = 0
    for first, length in pieces:
        assert first == position
        assert first % frames.BLOCK_ELEMENTS == 0
        assert length > 0
        position += length
    assert position == count


def test_ranges_of_an_empty_vector_are_refused() -> None:
    with pytest.raises(InvalidArgument):
        frames.split_ranges(0, 1)
