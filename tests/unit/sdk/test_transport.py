"""What a transport does with its channels."""

import threading
from typing import Any

import pytest

from phalanx.sdk import transport
from phalanx.sdk.transport import Transport


class Channel:
    """A channel with a call that has no end: closing waits for it."""

    def __init__(self) -> None:
        self.call_ends = threading.Event()
        self.begun = False

    def close(self) -> None:
        self.begun = True
        self.call_ends.wait()


def test_a_channel_that_does_not_close_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "CLOSE_S", 0.01)
    channels: Any = {"a:1": Channel(), "b:1": Channel()}
    opened = Transport(["a:1", "b:1"])
    opened._channels = dict(channels)
    opened.close()
    assert all(channel.begun for channel in channels.values())
    assert not opened._channels
    for channel in channels.values():
        channel.call_ends.set()
