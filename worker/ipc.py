"""Messages between the session process and a leaf process, over a Unix socket pair.

A message is a 5-byte head (length of the body, kind) and a body. What happens every step is packed
with `struct`; the rest is JSON, with raw bytes behind it where there are some. Descriptors of
shared memory travel beside the bytes.
"""

from __future__ import annotations

import array
import json
import select
import socket
import struct
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

_HEAD = struct.Struct("<IB")
_JSON = struct.Struct("<I")
_RUN = struct.Struct("<QIBqiHHH")
_RUN_PART = struct.Struct("<iii")
_COUNT = struct.Struct("<I")
_DONE = struct.Struct("<QHqdHHHd")
_ENDED = struct.Struct("<Q")
_CALL = struct.Struct("<QHdII")
_RECEIVE_BYTES = 256 * 1024
_FDS_MAX = 4

MESSAGE_LIMIT_BYTES = 1024 * 1024 * 1024
"""A longer message is a defect: plans with all code are below 1 MiB, and the longest are results of
tasks, of `phalanx.programs.RESULT_BYTES_MAX` at most."""


class Kind(IntEnum):
    """To the leaf process: SETUP … FETCHED; from it: the rest."""

    SETUP = 1
    DESCRIBE = 2
    RUN = 3
    DROP = 4
    FETCHED = 5
    FINGERPRINT = 6
    READY = 16
    SETUP_DONE = 17
    DESCRIBED = 18
    PART_DONE = 19
    PART_FAILED = 20
    TASK_ENDED = 21
    FETCH = 22
    PREFETCH = 23
    FINGERPRINTED = 24
    CALL_DONE = 25


@dataclass(slots=True)
class Message:
    """One received message; `fds` are the receiver's to close."""

    kind: Kind
    body: bytes
    fds: tuple[int, ...] = ()


class ConnectionClosed(Exception):
    """The other process is gone."""


@dataclass(slots=True)
class RunOrder:
    """Run the parts (first shard, span, payload buffer) of a task.

    Where nodes have a state, `states` has the buffers of each part: those to read, -1 for zero,
    then as many to write the next state to. Of calls of a program `inputs` has the results (digest,
    size) that each of them needs.
    """

    task: int
    job: int
    action: int
    version: int
    parameters: int
    parts: tuple[tuple[int, int, int], ...]
    absent: tuple[int, ...] = ()
    states: tuple[tuple[int, ...], ...] = ()
    inputs: tuple[tuple[tuple[str, int], ...], ...] = ()

    def pack(self) -> bytes:
        """Body of RUN."""
        head = _RUN.pack(
            self.task,
            self.job,
            self.action,
            self.version,
            self.parameters,
            len(self.parts),
            len(self.absent),
            len(self.states),
        )
        parts = b"".join(_RUN_PART.pack(*part) for part in self.parts)
        absent = struct.pack(f"<{len(self.absent)}i", *self.absent)
        states = [struct.pack(f"<I{len(each)}i", len(each), *each) for each in self.states]
        inputs = json.dumps(self.inputs).encode() if any(self.inputs) else b""
        return b"".join((head, parts, absent, *states, inputs))

    @classmethod
    def unpack(cls, body: bytes) -> RunOrder:
        """What `pack` packed."""
        task, job, action, version, parameters, parts, absent, states = _RUN.unpack_from(body)
        at = _RUN.size
        end = at + parts * _RUN_PART.size
        after = end + 4 * absent
        buffers = []
        for _ in range(states):
            (count,) = _COUNT.unpack_from(body, after)
            buffers.append(struct.unpack_from(f"<{count}i", body, after + _COUNT.size))
            after += _COUNT.size + 4 * count
        inputs = json.loads(body[after:]) if len(body) > after else []
        return cls(
            task=task,
            job=job,
            action=action,
            version=version,
            parameters=parameters,
            parts=tuple(_RUN_PART.iter_unpack(body[at:end])),
            absent=struct.unpack_from(f"<{absent}i", body, end),
            states=tuple(buffers),
            inputs=tuple(tuple((digest, size) for digest, size in each) for each in inputs),
        )


@dataclass(slots=True)
class PartDone:
    """Part `index` of a task is in its buffer; `seconds` has the time of each of its leaves, of
    which they waited `waited_s` together for their rows."""

    task: int
    index: int
    count: int
    loss: float
    mask: int
    sums: tuple[float, ...] = ()
    seconds: tuple[float, ...] = ()
    waited_s: float = 0.0

    def pack(self) -> bytes:
        """Body of PART_DONE."""
        mask = self.mask.to_bytes(-(-self.mask.bit_length() // 8), "little")
        head = _DONE.pack(
            self.task,
            self.index,
            self.count,
            self.loss,
            len(mask),
            len(self.sums),
            len(self.seconds),
            self.waited_s,
        )
        floats = struct.pack(f"<{len(self.sums)}d{len(self.seconds)}f", *self.sums, *self.seconds)
        return head + mask + floats

    @classmethod
    def unpack(cls, body: bytes) -> PartDone:
        """What `pack` packed."""
        task, index, count, loss, mask_bytes, sums, seconds, waited_s = _DONE.unpack_from(body)
        at = _DONE.size
        end = at + mask_bytes
        floats = struct.unpack_from(f"<{sums}d{seconds}f", body, end)
        mask = int.from_bytes(body[at:end], "little")
        return cls(task, index, count, loss, mask, floats[:sums], floats[sums:], waited_s)


@dataclass(frozen=True, slots=True)
class Returned:
    """What a call returned, and what it left beside that; see `phalanx.programs.data.Beside`."""

    value: memoryview
    kept: memoryview
    earlier: tuple[int, ...]


def pack_call(
    task: int,
    index: int,
    seconds: float,
    value: bytes,
    kept: bytes = b"",
    earlier: Sequence[int] = (),
) -> bytes:
    """Body of CALL_DONE: call `index` of a task took so long and returned this."""
    head = _CALL.pack(task, index, seconds, len(kept), len(earlier))
    return b"".join((head, struct.pack(f"<{len(earlier)}q", *earlier), kept, value))


def unpack_call(body: bytes) -> tuple[int, int, float, Returned]:
    """What `pack_call` packed; values are not copied."""
    task, index, seconds, kept_bytes, count = _CALL.unpack_from(body)
    earlier = struct.unpack_from(f"<{count}q", body, _CALL.size)
    rest = memoryview(body)[_CALL.size + 8 * count :]
    return task, index, seconds, Returned(rest[kept_bytes:], rest[:kept_bytes], earlier)


def pack_ended(task: int) -> bytes:
    """Body of TASK_ENDED."""
    return _ENDED.pack(task)


def unpack_ended(body: bytes) -> int:
    """The task of TASK_ENDED."""
    (task,) = _ENDED.unpack(body)
    return int(task)


def pack_json(document: dict[str, Any], blob: bytes = b"") -> bytes:
    """Body of the messages that are rare: JSON, then raw bytes."""
    text = json.dumps(document).encode()
    return _JSON.pack(len(text)) + text + blob


def unpack_json(body: bytes) -> tuple[dict[str, Any], bytes]:
    """What `pack_json` packed."""
    (size,) = _JSON.unpack_from(body)
    end = _JSON.size + size
    return json.loads(body[_JSON.size : end]), body[end:]


class Assembler:
    """Cuts what a stream socket delivers into messages again."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._fds: list[int] = []

    def feed(self, data: bytes, received: Sequence[int] = ()) -> list[Message]:
        """Add received bytes and descriptors; return the messages that are complete.

        Only SETUP carries a descriptor: one, or none where it has no arena.
        """
        self._buffer += data
        self._fds += received
        messages = []
        at = 0
        while len(self._buffer) - at >= _HEAD.size:
            size, kind = _HEAD.unpack_from(self._buffer, at)
            end = at + _HEAD.size + size
            if size > MESSAGE_LIMIT_BYTES:
                raise ValueError(f"a message of {size} bytes")
            if len(self._buffer) < end:
                break
            # A slice of the buffer would be one copy more, which for a result is hundreds of MiB.
            with memoryview(self._buffer) as view, view[at + _HEAD.size : end] as part:
                body = bytes(part)
            # A read may bring descriptors together with messages that were sent before them.
            fds = (self._fds.pop(0),) if kind == Kind.SETUP and self._fds else ()
            messages.append(Message(Kind(kind), body, fds))
            at = end
        del self._buffer[:at]
        return messages


def frame(kind: Kind, body: bytes = b"") -> bytes:
    """One message as it is on the socket."""
    return _HEAD.pack(len(body), kind) + body


def receive_some(connection: socket.socket) -> tuple[bytes, list[int]]:
    """One read of bytes and descriptors. Raises ConnectionClosed at the end of the stream."""
    ancillary_bytes = socket.CMSG_LEN(_FDS_MAX * array.array("i").itemsize)
    try:
        data, ancillary, _, _ = connection.recvmsg(_RECEIVE_BYTES, ancillary_bytes)
    except ConnectionError as error:
        raise ConnectionClosed(str(error)) from error
    fds = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    if not data:
        raise ConnectionClosed("the other process is gone")
    return data, list(fds)


class BlockingConnection:
    """The leaf process's end: one thread, plain calls."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)
        self._assembler = Assembler()
        self._ready: deque[Message] = deque()
        self._held_back = b""

    def send(self, kind: Kind, body: bytes = b"") -> None:
        """Send one message, after those that were held back. Raises ConnectionClosed."""
        data = self._held_back + frame(kind, body)
        self._held_back = b""
        try:
            self._socket.sendall(data)
        except ConnectionError as error:
            raise ConnectionClosed(str(error)) from error

    def send_with_next(self, kind: Kind, body: bytes) -> None:
        """Hold a message back and send it in one go with the next: one wake-up instead of two."""
        self._held_back += frame(kind, body)

    def has_message(self) -> bool:
        """Whether a message is here or arriving (or the other process is gone)."""
        return bool(self._ready) or bool(self._poll.poll(0))

    def receive(self) -> Message:
        """Wait for the next message. Raises ConnectionClosed."""
        while not self._ready:
            self._ready.extend(self._assembler.feed(*receive_some(self._socket)))
        return self._ready.popleft()

    def receive_only(self, kind: Kind) -> Message:
        """Wait for a message of this kind; others keep their order for later."""
        early: list[Message] = []
        while True:
            message = self.receive()
            if message.kind == kind:
                self._ready.extendleft(reversed(early))
                return message
            early.append(message)
