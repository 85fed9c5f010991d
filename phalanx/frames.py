"""Codec of the exchange stream's frames, and the grid on which vectors are cut.

A message is `ExchangeRequest` or `ExchangeResponse` of `phalanx.v1`: field 1 the header, field 2
the payload. Protobuf would copy the payload twice on each side; here it is joined once when a
message is made and viewed, never copied, when one arrives. The bytes on the wire are exactly those
that protobuf writes, and whatever protobuf accepts (another field order, unknown fields) is read.

A vector is cut into *ranges* (by owner) and ranges into *frames* (by message size). Both cut at
multiples of `BLOCK_ELEMENTS`, so that anything computed per block does not depend on either.
"""

from __future__ import annotations

from google.protobuf.message import DecodeError

from phalanx.errors import InvalidArgument
from phalanx.texts import number_of
from phalanx.v1 import aggregation_service_pb2 as pb

BLOCK_ELEMENTS = 65_536
"""Elements of one block: the unit at which ranges and frames may be cut."""

PAYLOAD_LIMIT_BYTES = 4 * 1024 * 1024 - 64 * 1024
"""Largest payload of one message: the message limit less room for the header."""

FRAME_BYTES = 1024 * 1024
"""Payload size that `frame_grid` aims for; measured, see docs/decisions on the exchange."""

Buffer = bytes | bytearray | memoryview

_HEADER_TAG = 0x0A
_PAYLOAD_TAG = 0x12
_JOINED_GO_RECORD_TAG = b"\x22"
_EMPTY = memoryview(b"")


def encode_request(header: pb.ExchangeRequestHeader, payload: Buffer | None = None) -> bytes:
    """Serialize one `ExchangeRequest`; `payload` is any contiguous buffer of raw elements."""
    return _encode(header.SerializeToString(), payload)


def decode_request(data: bytes) -> tuple[pb.ExchangeRequestHeader, memoryview]:
    """Read one `ExchangeRequest`: its header and a view of the payload inside `data`.

    Raises `InvalidArgument` where `data` is no such message.
    """
    try:
        parts = _split(data)
        if parts is not None:
            return pb.ExchangeRequestHeader.FromString(data[parts[0] : parts[1]]), parts[2]
        message = pb.ExchangeRequest.FromString(data)
    except DecodeError:
        raise _malformed(data) from None
    return message.header, memoryview(message.payload)


def encode_response(header: pb.ExchangeResponseHeader, payload: Buffer | None = None) -> bytes:
    """Serialize one `ExchangeResponse`; `payload` is any contiguous buffer of raw elements."""
    return _encode(header.SerializeToString(), payload)


def decode_response(data: bytes) -> tuple[pb.ExchangeResponseHeader, memoryview]:
    """Read one `ExchangeResponse`: its header and a view of the payload inside `data`.

    Raises `InvalidArgument` where `data` is no such message.
    """
    try:
        parts = _split(data)
        if parts is not None:
            return pb.ExchangeResponseHeader.FromString(data[parts[0] : parts[1]]), parts[2]
        message = pb.ExchangeResponse.FromString(data)
    except DecodeError:
        raise _malformed(data) from None
    return message.header, memoryview(message.payload)


def join_go_record(message: bytes, go_record: bytes) -> bytes:
    """Return an encoded `ExchangeResponse` with a serialized go record joined to its header."""
    start, length = _read_varint(message, 1, len(message))
    end = start + length
    field = b"".join((_JOINED_GO_RECORD_TAG, _varint(len(go_record)), go_record))
    size = _varint(length + len(field))
    return b"".join((message[:1], size, message[start:end], field, message[end:]))


def frame_grid(
    element_count: int, itemsize: int, frame_bytes: int = FRAME_BYTES
) -> list[tuple[int, int]]:
    """Cut a range of `element_count` elements into frames: a list of (first element, count).

    Frames are whole blocks (the last may be short) of about `frame_bytes`, never above
    `PAYLOAD_LIMIT_BYTES`. Both ends of the stream compute the same grid. An empty range has none.
    """
    if element_count < 0 or itemsize <= 0:
        raise InvalidArgument(
            f"a vector of {element_count} elements of {itemsize} bytes cannot be cut into frames"
        )
    block_bytes = BLOCK_ELEMENTS * itemsize
    if block_bytes > PAYLOAD_LIMIT_BYTES:
        raise InvalidArgument(f"elements of {itemsize} bytes do not fit: a block is over 4 MiB")
    blocks = max(1, min(frame_bytes, PAYLOAD_LIMIT_BYTES) // block_bytes)
    step = blocks * BLOCK_ELEMENTS
    return [(first, min(step, element_count - first)) for first in range(0, element_count, step)]


def split_ranges(element_count: int, range_count: int) -> list[tuple[int, int]]:
    """Split a vector into `range_count` ranges on block boundaries: (first element, count) each.

    Blocks are spread evenly. Raises `InvalidArgument` for more ranges than blocks.
    """
    blocks = -(-element_count // BLOCK_ELEMENTS)
    if element_count <= 0 or not 1 <= range_count <= blocks:
        raise InvalidArgument(
            f"{number_of(element_count, 'element')} in {number_of(max(blocks, 0), 'block')} cannot "
            f"be split into {number_of(range_count, 'range')}; use 1 to {max(blocks, 1)}"
        )
    cuts = [index * blocks // range_count * BLOCK_ELEMENTS for index in range(range_count)]
    ends = [*cuts[1:], element_count]
    return [(first, end - first) for first, end in zip(cuts, ends, strict=True)]


def _encode(header: bytes, payload: Buffer | None) -> bytes:
    size = 0 if payload is None else memoryview(payload).nbytes
    if payload is None or size == 0:
        return b"".join((b"\x0a", _varint(len(header)), header))
    return b"".join((b"\x0a", _varint(len(header)), header, b"\x12", _varint(size), payload))


def _malformed(data: bytes) -> InvalidArgument:
    return InvalidArgument(
        f"a message of {len(data)} bytes on the exchange stream is not valid protobuf; "
        "check that both ends run the same version"
    )


def _split(data: bytes) -> tuple[int, int, memoryview] | None:
    """(header start, header end, payload) of a message laid out as we write it, else None."""
    size = len(data)
    if size < 2 or data[0] != _HEADER_TAG:
        return None
    start, length = _read_varint(data, 1, size)
    end = start + length
    if end == size:
        return start, end, _EMPTY
    if end > size or data[end] != _PAYLOAD_TAG:
        return None
    first, length = _read_varint(data, end + 1, size)
    if first + length != size:
        return None
    return start, end, memoryview(data)[first:]


def _varint(value: int) -> bytes:
    if value < 0x80:
        return bytes((value,))
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: bytes, at: int, size: int) -> tuple[int, int]:
    """(position after the number, the number); lengths over 5 bytes are left to protobuf."""
    value = 0
    for shift in range(0, 35, 7):
        if at >= size:
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return at, value
    return size + 1, 0
