"""Remembered request ids."""

from collections.abc import Callable
from typing import TypeVar

from google.protobuf.message import Message

from storage.backends.sql.connection import Act, Connection
from storage.backends.sql.rows import REQUESTS
from storage.core.catalog import Remembered, recall, request_checksum

ResponseT = TypeVar("ResponseT", bound=Message)


def once(
    request: Message,
    request_id: str,
    response_class: type[ResponseT],
    act: Act[ResponseT],
    now_s: Callable[[], float],
    *,
    remembers: Callable[[ResponseT], bool] = lambda _: True,
) -> Act[ResponseT]:
    """Return an act that runs ``act`` once per request id and repeats its first answer.

    Requests without an id are run every time. Errors are not remembered, nor what
    ``remembers`` says no to.
    """
    if not request_id:
        return act
    kind = request.DESCRIPTOR.full_name

    def run(connection: Connection) -> ResponseT:
        row = REQUESTS.find_or_none(connection, kind, request_id)
        first = recall(None if row is None else Remembered(*row[2:4]), request_id, request)
        if first is not None:
            return response_class.FromString(first)
        response = act(connection)
        if not remembers(response):
            return response
        row = REQUESTS.sealed(
            kind, request_id, request_checksum(request), response.SerializeToString(), now_s()
        )
        connection.execute(REQUESTS.insertion, row)
        return response

    return run
