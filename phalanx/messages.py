"""Messages of processes of two versions."""

from __future__ import annotations

from typing import TypeVar

from google.protobuf.message import Message

MessageT = TypeVar("MessageT", bound=Message)


def known(message: MessageT) -> MessageT:
    """Return a copy without the fields that this version does not know.

    Whatever is compared with a message of another process, or hashed to be, is compared so: what a
    later version says in addition makes no difference to what both know.
    """
    copy = type(message)()
    copy.CopyFrom(message)
    copy.DiscardUnknownFields()
    return copy
