"""What storage and a process that makes chunks say to each other over a socket.

A message is a header in JSON and a body of bytes, both with their lengths before them.
"""

import json
import socket
import struct
from collections.abc import Mapping
from typing import Any

_LENGTHS = struct.Struct("<IQ")
_HEADER_LIMIT_BYTES = 1024 * 1024
_BODY_LIMIT_BYTES = 256 * 1024 * 1024

Message = tuple[dict[str, Any], bytes]


def send(to: socket.socket, header: Mapping[str, Any], body: bytes = b"") -> None:
    """Send a message. Raises OSError."""
    text = json.dumps(header).encode()
    to.sendall(_LENGTHS.pack(len(text), len(body)) + text)
    to.sendall(body)


def receive(source: socket.socket) -> Message | None:
    """Return the next message; None where the other side is gone. Raises OSError."""
    lengths = _read(source, _LENGTHS.size)
    if lengths is None:
        return None
    header_bytes, body_bytes = _LENGTHS.unpack(lengths)
    if header_bytes > _HEADER_LIMIT_BYTES or body_bytes > _BODY_LIMIT_BYTES:
        return None
    header, body = _read(source, header_bytes), _read(source, body_bytes)
    if header is None or body is None:
        return None
    return json.loads(header), bytes(body)


def _read(source: socket.socket, size_bytes: int) -> bytearray | None:
    buffer = bytearray(size_bytes)
    rest = memoryview(buffer)
    while rest:
        count = source.recv_into(rest)
        if not count:
            return None
        rest = rest[count:]
    return buffer
