"""Sending to a leaf process without ever waiting for it."""

from __future__ import annotations

import asyncio
import os
import socket
from collections import deque


class SocketSender:
    """Sends messages in order; what the socket does not take at once follows as soon as it does."""

    def __init__(self, loop: asyncio.AbstractEventLoop, connection: socket.socket) -> None:
        self._loop = loop
        self._socket = connection
        self._unsent: deque[tuple[bytes, tuple[int, ...]]] = deque()
        self._waits_for_room = False

    def send(self, data: bytes, fds: tuple[int, ...] = ()) -> None:
        """Send data, descriptors with its first byte; the caller may close its own at once."""
        # Copies: whoever handed them over may be gone, and the number another file's, by then.
        self._unsent.append((data, tuple(os.dup(fd) for fd in fds)))
        if len(self._unsent) == 1:
            self._flush()

    def close(self) -> None:
        """Give up what was not sent. The socket stays the caller's."""
        self._wait_no_more()
        while self._unsent:
            _close_all(self._unsent.popleft()[1])

    def _flush(self) -> None:
        while self._unsent:
            data, fds = self._unsent[0]
            try:
                if fds:
                    sent = socket.send_fds(self._socket, [data], fds)
                else:
                    sent = self._socket.send(data)
            except BlockingIOError:
                sent = 0
            except OSError:
                # It is dying; its exit is what counts.
                self.close()
                return
            if sent:
                _close_all(fds)
                fds = ()
            if sent < len(data):
                self._unsent[0] = (data[sent:], fds)
                self._loop.add_writer(self._socket, self._flush)
                self._waits_for_room = True
                return
            self._unsent.popleft()
        self._wait_no_more()

    def _wait_no_more(self) -> None:
        if self._waits_for_room:
            self._waits_for_room = False
            self._loop.remove_writer(self._socket)


def _close_all(fds: tuple[int, ...]) -> None:
    for fd in fds:
        os.close(fd)
